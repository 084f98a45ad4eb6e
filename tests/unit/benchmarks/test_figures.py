"""The figures drawn from the lines of scaling.py are small and the same each time."""

from pathlib import Path
from typing import Any

import pytest


def lines_of(scaling: Any) -> list[dict[str, Any]]:
    base = {"rows": 512, "cols": 1024}
    return [
        {
            "benchmark": "scaling",
            "stage": name,
            "variable": variable,
            "base": base,
            "values": list(scaling.VALUES[variable]),
            "seconds": [0.001 * value for value in scaling.VALUES[variable]],
            "exponent": 1.0,
        }
        for name, stage in scaling.STAGES.items()
        for variable in stage.variables
    ]


def test_figures_are_small_and_the_same_each_time(bench: Any, tmp_path: Path) -> None:
    figures, scaling = bench("figures"), bench("scaling")
    found = lines_of(scaling)
    small = [line | {"base": {"rows": 8, "cols": 8}, "exponent": 9.0} for line in found]
    first = figures.all_figures([*small, *found], tmp_path / "a")
    second = figures.all_figures(found, tmp_path / "b")
    assert [path.name for path in first] == [path.name for path in second] and len(first) == len(scaling.VALUES)
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes() and one.stat().st_size < 60_000
        assert "1.00" in one.read_text(encoding="utf-8")
    assert figures.COLOURS.keys() == scaling.STAGES.keys() and figures.AXES.keys() == scaling.VALUES.keys()
    assert "effort.svg" not in {path.name for path in first}, "nothing was measured by effort"
    with pytest.raises(SystemExit, match="no lines"):
        figures.all_figures([], tmp_path / "c")


def test_the_page_shows_figures_that_exist_and_are_drawn(bench: Any) -> None:
    root = Path(__file__).resolve().parents[3]
    page = (root / "docs" / "performance.md").read_text(encoding="utf-8")
    for variable in bench("figures").AXES:
        name = f"figures/scaling-{variable.replace('_', '-')}.svg"
        assert f"]({name})" in page
        assert 1000 < (root / "docs" / name).stat().st_size < 60_000


def test_efforts_are_drawn_where_all_three_were_measured(bench: Any, tmp_path: Path) -> None:
    figures = bench("figures")

    def line(scheme: str, variant: str, seconds: float, kl: float) -> dict[str, Any]:
        head = {"benchmark": "quality", "model": "tiny", "scheme": scheme, "variant": variant}
        return head | {"seconds": {"total": seconds}, "kl_mean": kl}

    whole = [line("NU4", "fast", 10, 0.2), line("NU4", "default", 20, 0.1), line("NU4", "best", 80, 0.05)]
    part = [line("NU3", "fast", 10, 0.2), line("NU3", "default", 20, 0.1)]
    assert not figures.draw_efforts(part, tmp_path / "none.svg") and not (tmp_path / "none.svg").exists()
    assert figures.draw_efforts([*part, *whole], tmp_path / "one.svg")
    drawn = (tmp_path / "one.svg").read_text(encoding="utf-8")
    assert "tiny  NU4" in drawn and "NU3" not in drawn and drawn.count("best") == 1

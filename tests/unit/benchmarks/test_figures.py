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
    with pytest.raises(SystemExit, match="no lines"):
        figures.all_figures([], tmp_path / "c")


def test_the_page_shows_figures_that_exist_and_are_drawn(bench: Any) -> None:
    root = Path(__file__).resolve().parents[3]
    page = (root / "docs" / "performance.md").read_text(encoding="utf-8")
    for variable in bench("figures").AXES:
        name = f"figures/scaling-{variable.replace('_', '-')}.svg"
        assert f"]({name})" in page
        assert 1000 < (root / "docs" / name).stat().st_size < 60_000

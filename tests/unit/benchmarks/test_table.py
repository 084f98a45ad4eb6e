"""The generated tables of the pages."""

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]


LINES: list[dict[str, Any]] = [
    {
        "model": "A",
        "scheme": "NU4",
        "variant": "default",
        "bits": 4.5,
        "kl_mean": 0.1017,
        "recipe": {"p": 4.0},
        "seconds": {"total": 61.2},
    },
    {
        "model": "A",
        "scheme": "NU4",
        "variant": "paper",
        "bits": 4.5,
        "kl_mean": 0.1181,
        "recipe": {"p": 4.0},
        "seconds": {"total": 40.0},
    },
    {
        "model": "A",
        "scheme": "RTN4",
        "variant": "default",
        "bits": 4.0,
        "kl_mean": None,
        "recipe": {"p": 2.0},
        "seconds": {"total": 9.0},
    },
    {
        "model": "B",
        "scheme": "NU4",
        "variant": "default",
        "bits": 10.8,
        "kl_mean": 0.02,
        "recipe": {"p": 4.0},
        "seconds": {"total": 1.0},
    },
]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    (tmp_path / "quality.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES), encoding="utf-8")
    (tmp_path / "demo.json").write_text(json.dumps({"rows": LINES}), encoding="utf-8")
    return tmp_path


def test_a_list(bench: Any, results: Path) -> None:
    text = "a\n<!-- table: quality.jsonl model=A | scheme, kl_mean:.3f=KL, recipe.p:.0f -->\nold\n<!-- end -->\nb\n"
    wanted = "| scheme | KL | p |\n| --- | ---: | ---: |\n| NU4 | 0.102 | 4 |\n| NU4 | 0.118 | 4 |\n| RTN4 |  | 2 |\n"
    found = bench("table").render(text, results)
    assert wanted in found and "old" not in found and found.startswith("a\n") and found.endswith("-->\nb\n")
    assert bench("table").render(found, results) == found
    assert wanted in bench("table").render(text.replace("quality.jsonl", "demo.json"), results)


def test_a_list_of_several_values_that_names_each_once(bench: Any, results: Path) -> None:
    start = "<!-- table: quality.jsonl model=A,B scheme=NU4 | model, variant, kl_mean:.3f"
    found = bench("table").render(f"{start} | once: model, scheme -->\n<!-- end -->", results)
    assert found.splitlines()[3:-1] == ["| A | paper | 0.118 |", "| B | default | 0.020 |"]
    with pytest.raises(SystemExit, match="cannot read one"):
        bench("table").render(f"{start} | one: model -->\n<!-- end -->", results)


def test_a_pivot(bench: Any, results: Path) -> None:
    parts = ("scheme, bits:.1f", "variant: default, paper=the paper", "kl_mean:.3f, seconds.total:.0f")
    marker = f"<!-- pivot: quality.jsonl model=A | {' | '.join(parts)} -->"
    found = bench("table").render(f"{marker}\n<!-- end -->", results)
    assert found.splitlines()[1:-1] == [
        "| scheme | bits | default | the paper |",
        "| --- | ---: | ---: | ---: |",
        "| NU4 | 4.5 | 0.102 / 61 | 0.118 / 40 |",
        "| RTN4 | 4.0 |  / 9 |  |",
    ]


def test_a_table_without_lines_is_refused(bench: Any, results: Path) -> None:
    with pytest.raises(SystemExit, match=r"no line of quality\.jsonl has model=C"):
        bench("table").render("<!-- table: quality.jsonl model=C | scheme -->\n<!-- end -->", results)
    for lacking in ("quality.jsonl model=C", "experiments/results/none.jsonl"):
        shown = bench("table").render(
            f"<!-- pivot?: {lacking} | scheme | variant: a | kl_mean -->\nold\n<!-- end -->", results
        )
        assert shown == f"<!-- pivot?: {lacking} | scheme | variant: a | kl_mean -->\n*Not run yet.*\n<!-- end -->"
    with pytest.raises(SystemExit, match="cannot read"):
        bench("table").render("<!-- pivot: quality.jsonl | scheme | kl_mean -->\n<!-- end -->", results)


def test_the_pages_are_up_to_date(bench: Any) -> None:
    for page in bench("table").PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        assert bench("table").render(text) == text, f"{page}: python benchmarks/table.py"

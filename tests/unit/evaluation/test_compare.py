"""Several results side by side: whose figures stand beside each other, the front, and the page."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from report_facts import EVALUATION, QUALITY, directory
from tiny_run import digest

from leangrid.errors import LeangridError, OutputError, VerifyError
from leangrid.evaluation.compare import compare
from leangrid.recipe import Recipe
from leangrid.report.text import comparison_summary
from leangrid.run.quantize import quantize

Tiny = Callable[..., Path]
pytestmark = pytest.mark.filterwarnings("ignore:leangrid runs without its C")


def three(tmp_path: Path, **more: Any) -> list[Path]:
    """Smaller and worse, larger and better, and one that is beaten by the second."""
    figures = ((100, 0.5), (200, 0.1), (300, 0.2))
    return [
        directory(tmp_path / f"out{i}", size, quality={**QUALITY, "value": value}, **more)
        for i, (size, value) in enumerate(figures)
    ]


def test_the_front_is_what_no_other_beats(tmp_path: Path) -> None:
    found = compare(three(tmp_path))
    assert [row.front for row in found.rows] == [True, True, False]
    assert [(row.name, row.bytes, row.kl_mean) for row in found.rows] == [
        ("out0", 100, 0.5),
        ("out1", 200, 0.1),
        ("out2", 300, 0.2),
    ]
    assert (
        "quality gate" in found.measured_on
        and "DIFFERENT" not in found.measured_on
        and found.reference_perplexity == 18.25
    )
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False)) == found.to_dict()
    text = comparison_summary(found.to_dict())
    assert text.splitlines()[2].startswith("*") and text.splitlines()[4].startswith(" ") and "1 - cosine" not in text


def test_an_evaluation_that_all_share_comes_before_the_gates(tmp_path: Path) -> None:
    shared, own = EVALUATION, {**EVALUATION, "length": 512, "kl_mean": 0.9}
    one = directory(tmp_path / "one", evaluations=[shared, own])
    other = directory(tmp_path / "other", evaluations=[{**shared, "kl_mean": 0.3}])
    found = compare([one, other])
    assert [row.kl_mean for row in found.rows] == [
        0.1171,
        0.3,
    ] and found.measured_on == "on 12 windows of 1024 tokens of wiki.txt"
    lone = compare([one, directory(tmp_path / "third")])
    assert [row.kl_mean for row in lone.rows] == [0.11, 0.11] and "quality gate" in lone.measured_on


def test_gates_of_different_windows_are_said_to_be_no_comparison(tmp_path: Path) -> None:
    results = three(tmp_path)
    made = json.loads((results[0] / "manifest.json").read_text())["result"]
    other = directory(tmp_path / "other", result={**made, "windows_sha256": "2" * 64})
    assert "DIFFERENT calibration windows" in compare([results[0], other]).measured_on


@pytest.mark.parametrize(
    "more",
    [
        {"quality": {}},
        {"quality": {"measure": "cosine", "value": 0.01}},
        {"quality": {"error": "no", "measure": "kl", "value": None}},
        {"run": {}},
    ],
)
def test_parts_may_be_missing(more: dict[str, Any], tmp_path: Path) -> None:
    found = compare(
        [directory(tmp_path / "one", **more), directory(tmp_path / "<script>", **more)], plot=tmp_path / "p.html"
    )
    page = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert (
        "<script>" not in page
        and "&lt;script&gt;" in page
        and "None" not in page
        and "None" not in comparison_summary(found.to_dict())
    )
    assert ("1 − cosine" in page) == (found.rows[0].embedding_cosine_mean is not None)
    assert ("Nothing was measured" in page) == (
        found.rows[0].kl_mean is None and found.rows[0].embedding_cosine_mean is None
    )


def test_the_page_has_the_front_and_asks_for_nothing(tmp_path: Path) -> None:
    compare(three(tmp_path), plot=tmp_path / "p.html")
    page = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert (
        page.count('class="mark') == 3
        and "2 of them on the front" in page
        and "default-src 'none'" in page
        and "src=" not in page
    )


def test_with_a_reference_all_are_measured_on_one_text(tiny: Tiny, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A sentence of a text that is long enough. " * 100)
    for scheme in ("NU2", "NU4"):
        quantize(tiny("llama3"), tmp_path / scheme, Recipe(scheme=scheme), windows=tiny_models.tokens(4, 32))
    found = compare([tmp_path / "NU2", tmp_path / "NU4"], tiny("llama3"), str(text), length=32, windows=2)
    assert (
        found.rows[0].kl_mean > found.rows[1].kl_mean > 0
        and found.measured_on == "on 2 windows of 32 tokens of text.txt"
    )
    assert [row.front for row in found.rows] == [True, True] and found.reference_perplexity > 1
    assert all(row.seconds > 0 and row.loss > 0 for row in found.rows)


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("damaged", "not what its manifest says"),
        ("twice", "named twice"),
        ("suffix", "HTML page"),
        ("folder", "cannot be written there"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(kind: str, told: str, tmp_path: Path) -> None:
    results, plot = three(tmp_path), tmp_path / {"suffix": "p.svg", "folder": "none/p.html"}.get(kind, "p.html")
    if kind == "damaged":
        (results[1] / "model.safetensors").write_text("y")
    before = digest(tmp_path)
    with pytest.raises((VerifyError, OutputError, LeangridError), match=told):
        compare([*results, *(results[:1] if kind == "twice" else [])], plot=plot)
    assert digest(tmp_path) == before

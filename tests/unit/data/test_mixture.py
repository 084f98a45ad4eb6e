"""Calibration from several sources at once: so many windows of each, spread over the whole."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
import torch

from leangrid.data.calibration import make_windows
from leangrid.data.documents import Reading
from leangrid.errors import CalibrationError, RecipeError
from leangrid.mixture import first_read, sources_of, split_mixture, spread
from leangrid.recipe import Recipe
from leangrid.report.card import describe_calibration
from leangrid.run.inputs import windows_identity
from leangrid.run.quantize import quantize

Tiny = Callable[..., Path]


def _texts(folder: Path) -> tuple[str, str]:
    for name in ("one", "two"):
        (folder / f"{name}.txt").write_text(" ".join(f"{name} {number} words of it" for number in range(400)))
    return str(folder / "one.txt"), str(folder / "two.txt")


def _own(samples: int, length: int, seed: int) -> torch.Tensor:
    return torch.full((samples, length), 7 + seed)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("c4:64,self:16", [("c4", 64), ("self", 16)]),
        ("c4:64, a folder/x.txt:16", [("c4", 64), ("a folder/x.txt", 16)]),
        ("hf:org/name:train:text:8,hf:org/name@main:4", [("hf:org/name:train:text", 8), ("hf:org/name@main", 4)]),
        ("c4", []),
        ("c4:64", []),
        ("hf:org/name:2024", []),
        ("a,b.txt", []),
        ("c4:64,self", []),
    ],
)
def test_a_mixture_is_two_or_more_sources_with_their_windows(text: str, parts: list[tuple[str, int]]) -> None:
    assert [(part.source, part.windows) for part in split_mixture(text)] == parts
    assert sources_of(text) == (tuple(name for name, _ in parts) or (text,))


def test_the_windows_of_each_source_are_its_first_and_spread_over_the_whole(tmp_path: Path) -> None:
    one, two = _texts(tmp_path)
    tokenizer, reading = tiny_models.tokenizer(), Reading("both")
    recipe = Recipe(calibration=f"{one}:6,self:3,{two}:2", length=16, seed=1)
    assert recipe.samples == 11
    found = make_windows(recipe, tokenizer, _own, reading=reading, extra=2)
    alone = [make_windows(Recipe(calibration=name, samples=8, length=16), tokenizer) for name in (one, two)]
    order = spread((6, 3, 2))
    assert [order.count(source) for source in range(3)] == [6, 3, 2]
    assert set(order[:6]) == set(order[-5:]) == {0, 1, 2}
    source_0, source_1, source_2 = (found[:11][torch.tensor(order) == number] for number in range(3))
    assert torch.equal(source_0, alone[0][:6])
    assert torch.equal(source_1, _own(3, 16, 1))
    assert torch.equal(source_2, alone[1][:2])
    assert torch.equal(found[11:], alone[0][6:8])  # more of the first that is read, for the quality gate
    assert [part.source for part in reading.parts] == [one, "self", two]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"calibration": "c4:64,self:16", "samples": 32}, "samples is 32, and the sources"),
        ({"calibration": "c4:64,self:0"}, "gives no windows"),
        ({"calibration": "c4:64,c4:16"}, "names a source twice"),
        ({"calibration": "c4:64,wikitext2:16", "text_field": "body"}, "the column of one source"),
    ],
)
def test_a_mixture_that_contradicts_itself_is_refused(fields: dict[str, object], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        Recipe.model_validate(fields)


def test_a_source_that_is_too_short_is_named(tmp_path: Path) -> None:
    one, two = _texts(tmp_path)
    with pytest.raises(CalibrationError, match="too little text") as caught:
        make_windows(Recipe(calibration=f"{one}:2,{two}:5000", length=64), tiny_models.tokenizer())
    assert two in str(caught.value) and one not in str(caught.value)


def test_another_text_in_one_source_is_another_run(tmp_path: Path) -> None:
    one, two = _texts(tmp_path)
    recipe = Recipe(calibration=f"{one}:2,{two}:3,c4:1")
    before = windows_identity(recipe, None)
    Path(two).write_text("another text")
    assert windows_identity(recipe, None) != before


def test_a_run_by_a_mixture_says_so(tiny: Tiny, tmp_path: Path) -> None:
    one, _ = _texts(tmp_path)
    recipe = Recipe(scheme="NU4", calibration=f"{one}:3,self:2", length=16)
    quantize(tiny("llama2"), tmp_path / "out", recipe)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_bytes())
    assert manifest["recipe"]["calibration"] == f"{one}:3,self:2"
    assert manifest["recipe"]["samples"] == 5
    assert [part["source"] for part in manifest["calibration"]["parts"]] == [one, "self"]
    assert describe_calibration(recipe) == "3 windows of one.txt and 2 windows of text sampled from the model itself"
    assert first_read(recipe.calibration) == one

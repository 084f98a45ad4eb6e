"""The effort best adds calibration text that the model writes where there are few tokens, and nowhere else."""

import json
from collections.abc import Callable
from pathlib import Path

import picture_models
import pytest
import torch

from leangrid.mixture import beside_own_text
from leangrid.models.skeleton import Skeleton
from leangrid.planning import resolve
from leangrid.planning.plan import plan
from leangrid.planning.resolve import open_checkpoint
from leangrid.recipe import Recipe
from leangrid.report.text import plan_summary
from leangrid.run.quantize import quantize
from leangrid.storage.remote import Remote
from leangrid.storage.source import open_source

Tiny = Callable[..., Path]


def _recipe(folder: Path, **fields: object) -> Recipe:
    text = folder / "words.txt"
    text.write_text(" ".join(f"{number} words of it" for number in range(400)))
    return Recipe.model_validate(
        {"scheme": "NU4", "calibration": str(text), "samples": 4, "length": 16, "effort": "best"} | fields
    )


def _resolved(source: Path, recipe: Recipe) -> tuple[str, int]:
    resolved = open_checkpoint(source, recipe)[2]
    return resolved.calibration.rpartition("/")[2], resolved.samples


@pytest.mark.parametrize(
    ("calibration", "samples", "length", "mixed"),
    [
        ("c4", 16, 1024, "c4:16,self:48"),
        ("c4", 8, 512, "c4:8,self:24"),  # three to each, however few that is
        ("c4", 31, 2048, "c4:31,self:1"),
        ("c4", 32, 2048, "c4"),
        ("c4", 128, 2048, "c4"),
        ("hf:org/name:train", 4, 64, "hf:org/name:train:4,self:12"),
        ("self", 16, 64, "self"),
        ("c4:8,self:8", 16, 64, "c4:8,self:8"),  # chosen by hand
        ("one,two.txt", 4, 64, "one,two.txt"),  # which would be read as two sources
    ],
)
def test_three_windows_to_each_up_to_so_many_tokens(calibration: str, samples: int, length: int, mixed: str) -> None:
    assert beside_own_text(calibration, samples, length, resolve.OWN_TOKENS) == mixed


def test_only_best_adds_text_and_only_to_a_language_model_of_text(tiny: Tiny, tmp_path: Path) -> None:
    def calibration(model: str, **fields: object) -> tuple[str, int]:
        return _resolved(tiny(model), _recipe(tmp_path, **fields))

    alone = ("words.txt", 4)
    assert calibration("llama2") == ("words.txt:4,self:12", 16)
    assert calibration("llama2", tune=0, finish=0) == ("words.txt:4,self:12", 16)
    assert calibration("llama2", effort="good", tune=4, finish=4) == alone
    assert calibration("bert") == alone
    pictures = picture_models.save("qwen3_vl", tmp_path / "vl")
    assert _resolved(pictures, _recipe(tmp_path)) == alone  # a file that may have pictures
    assert _resolved(pictures, _recipe(tmp_path, calibration="embedded")) == ("embedded:4,self:12", 16)
    asked = _recipe(tmp_path)
    assert open_checkpoint(tiny("llama2"), asked, adds_text=False)[2].calibration == asked.calibration
    once = open_checkpoint(tiny("llama2"), asked)[2]
    assert open_checkpoint(tiny("llama2"), once)[2] == once  # as a manifest has it


def test_a_streamed_model_writes_nothing_in_plan_or_run(tiny: Tiny, tmp_path: Path) -> None:
    asked = _recipe(tmp_path)
    with open_source(tiny("llama2")) as checkpoint:
        skeleton = Skeleton(checkpoint)
        assert resolve.resolve_recipe(asked, skeleton).samples == 16
        vars(checkpoint)["remote"] = Remote.__new__(Remote)
        assert resolve.resolve_recipe(asked, skeleton).calibration == asked.calibration


def test_a_large_model_writes_nothing(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolve, "_MOST_PARAMETERS", 1000)
    asked = _recipe(tmp_path)
    assert open_checkpoint(tiny("llama2"), asked)[2].calibration == asked.calibration


def test_plan_manifest_and_notices_name_what_was_added(tiny: Tiny, tmp_path: Path) -> None:
    recipe, out, said = _recipe(tmp_path, tune=1, finish=0), tmp_path / "out", list[str]()
    planned = plan(tiny("llama2"), recipe)
    assert (planned.samples, planned.length) == (16, 16)
    assert f"16 x 16 tokens: {recipe.calibration}:4,self:12" in plan_summary(planned.to_dict())
    quantize(tiny("llama2"), out, recipe, progress=lambda event: said.append(event.message or ""))
    manifest = json.loads((out / "manifest.json").read_bytes())
    assert manifest["recipe"]["calibration"] == f"{recipe.calibration}:4,self:12"
    assert manifest["calibration"]["written_on"] == "cpu"
    assert sum("12 calibration windows that the model writes itself" in sentence for sentence in said) == 1
    by_hand = Recipe.model_validate({**manifest["recipe"], "effort": "good"})
    quantize(tiny("llama2"), tmp_path / "by_hand", by_hand)
    weights = [(folder / "model.safetensors").read_bytes() for folder in (out, tmp_path / "by_hand")]
    assert weights[0] == weights[1]


def test_windows_given_stay_as_they_are(tiny: Tiny, tmp_path: Path) -> None:
    recipe, windows = _recipe(tmp_path, tune=1, finish=0), torch.arange(64).view(4, 16)
    quantize(tiny("llama2"), tmp_path / "out", recipe, windows=windows)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_bytes())
    assert manifest["recipe"]["samples"] == 4 and "self" not in manifest["recipe"]["calibration"]


def test_a_column_is_that_of_the_text_that_is_read(tiny: Tiny, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"body": f"{n} words of it " * 8, "text": "no"}) + "\n" for n in range(40)))
    recipe = _recipe(tmp_path, calibration=str(rows), text_field="body", tune=0, finish=0)
    quantize(tiny("llama2"), tmp_path / "out", recipe)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_bytes())
    assert [part["source"] for part in manifest["calibration"]["parts"]] == [str(rows), "self"]
    assert [part["fields"] for part in manifest["calibration"]["parts"]] == [["body"], []]

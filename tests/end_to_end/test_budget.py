"""A budget in whole runs: what is measured beside transformers' own forward, what is chosen beside all choices, stopped
runs, and the files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor

import leangrid
from leangrid.errors import NumericalError
from leangrid.grids import Precision, grid_class
from leangrid.inference.load import load
from leangrid.models.skeleton import Skeleton
from leangrid.planning.budget import Budget
from leangrid.planning.resolve import resolve_recipe
from leangrid.progress import Event
from leangrid.recipe import Recipe
from leangrid.run import budget as spending
from leangrid.run.quantize import quantize
from leangrid.storage.source import open_source

Tiny = Callable[..., Path]
WINDOWS = tiny_models.tokens(9, 32)
RECIPE = Recipe(scheme="W4A16_G32_SYM", bits=4.7, steps=64)


def _manifest(out: Path) -> dict[str, Any]:
    return json.loads((out / "manifest.json").read_bytes())


def _weights(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


def _outputs(model: Any, windows: Tensor) -> Tensor:
    found = model(windows)
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


@pytest.mark.parametrize("name", ["llama2", "bert", "qwen3_moe"])
def test_the_distance_of_a_unit_is_that_of_transformers_with_the_unit_rounded(
    name: str, tiny: Tiny, tmp_path: Path
) -> None:
    quantize(tiny(name), tmp_path / "out", RECIPE, windows=WINDOWS)
    units = _manifest(tmp_path / "out")["budget"]["units"]
    skeleton = Skeleton(open_source(tiny(name)))
    budget = Budget.of(skeleton, resolve_recipe(RECIPE, skeleton))
    model, _ = load(tiny(name), dtype=torch.float32)
    assert len(units) == len(budget.units)
    with torch.no_grad():
        wanted = _outputs(model, WINDOWS[:8]).double()
        for unit, said in zip(budget.units, units, strict=True):
            if unit.experts:  # which transformers holds in tensors of all experts
                assert said["distance"] > 0
                continue
            kept = {}
            for layer in unit.names:
                weight = model.get_submodule(skeleton.path(layer)).weight
                kept[layer] = weight.data
                scheme = leangrid.Scheme.parse(said["rounded_to"])
                grid = grid_class(scheme).fit_minmax(weight.data, scheme, Precision(torch.float32))
                weight.data = grid.dequantize(grid.nearest(weight.data))
            given = _outputs(model, WINDOWS[:8]).double()
            for layer, weight in kept.items():
                model.get_submodule(skeleton.path(layer)).weight.data = weight
            if name == "bert":
                expected = ((given - wanted).square().sum(-1) / wanted.square().sum(-1)).mean()
            else:
                p, q = (torch.log_softmax(one[:, :-1], -1) for one in (wanted, given))
                expected = (p.exp() * (p - q)).sum(-1).mean()
            assert said["distance"] == pytest.approx(float(expected), rel=2e-3), said["linears"]


def test_what_is_chosen_is_the_best_and_its_recipe_gives_it_again(tiny: Tiny, tmp_path: Path) -> None:
    result = quantize(tiny("llama2"), tmp_path / "out", RECIPE, windows=WINDOWS)
    manifest = _manifest(tmp_path / "out")
    found = manifest["budget"]
    skeleton = Skeleton(open_source(tiny("llama2")))
    budget = Budget.of(skeleton, resolve_recipe(RECIPE, skeleton))
    best = {0: 0.0}  # bytes -> least sum of distances, over all choices
    for unit, said in zip(budget.units, found["units"], strict=True):
        more: dict[int, float] = {}
        for size, loss in best.items():
            for one, added in zip(unit.sizes, said["expected"].values(), strict=True):
                if size + one <= budget.room:
                    more[size + one] = min(more.get(size + one, float("inf")), loss + added)
        best = more
    assert found["expected"] == pytest.approx(min(best.values()), rel=1e-4)
    assert 4.7 - 0.3 < result.bits_per_weight <= 4.7
    assert len(result.budget["widths"]) > 1
    records = map(json.loads, (tmp_path / "out" / "records.jsonl").read_text().splitlines())
    schemes = {name: said["scheme"] for said in found["units"] for name in said["linears"]}
    assert {record["name"]: record["scheme"] for record in records} == schemes
    for page in ("README.md", "report.html"):
        assert next(iter(result.budget["widths"])) in (tmp_path / "out" / page).read_text()
    again = Recipe.model_validate(manifest["recipe"])
    assert not again.has_budget
    quantize(tiny("llama2"), tmp_path / "again", again, windows=WINDOWS)
    assert _weights(tmp_path / "again") == _weights(tmp_path / "out")


@pytest.mark.parametrize("name", ["llama2", "qwen3_moe", pytest.param("gemma3n", marks=pytest.mark.slow)])
def test_a_run_stopped_while_it_measures_or_afterwards_ends_in_the_same_bytes(
    name: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = RECIPE if name != "gemma3n" else Recipe(scheme="W4A16", bits=4.9, steps=16)
    windows, tried, real = WINDOWS[:3], [0], spending.trial_losses

    def counted(*args: Any) -> Tensor:
        tried[0] += 1
        return real(*args)

    def stop_at(words: str) -> Callable[[Event], None]:
        def stop(event: Event) -> None:
            if event.message.startswith(words) or event.stage == words:
                raise KeyboardInterrupt

        return stop

    monkeypatch.setattr(spending, "trial_losses", counted)
    whole = quantize(tiny(name), tmp_path / "whole", recipe, windows=windows)
    once, tried[0] = tried[0], 0
    for words in ("measured what widths cost in 1 of", "block"):
        with pytest.raises(KeyboardInterrupt):
            quantize(tiny(name), tmp_path / "out", recipe, windows=windows, progress=stop_at(words))
    result = quantize(tiny(name), tmp_path / "out", recipe, windows=windows)
    assert tried[0] == once  # no block was measured twice
    assert _weights(tmp_path / "out") == _weights(tmp_path / "whole")
    assert result.budget == whole.budget
    assert _manifest(tmp_path / "out")["budget"] == _manifest(tmp_path / "whole")["budget"]


@pytest.mark.parametrize("size", [420_000, 450_000])
def test_the_whole_directory_is_no_larger_than_its_budget(size: int, tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = quantize(tiny("llama2"), out, Recipe(scheme="W4A16_G32", size=size, steps=64), windows=WINDOWS[:2])
    taken = sum(file.stat().st_size for file in out.iterdir())
    assert result.bytes <= size
    assert 0.85 * size < taken <= size


def test_a_distance_that_is_not_finite_is_named(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spending, "trial_losses", lambda *args: torch.full((6, 2), float("nan"), dtype=torch.float64))
    with pytest.raises(NumericalError, match=r"layers\.0\.self_attn\.q_proj.*Use a scheme for all layers"):
        quantize(tiny("llama2"), tmp_path / "out", RECIPE, windows=WINDOWS[:2])

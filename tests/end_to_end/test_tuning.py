"""Block tuning in whole runs: what the result gives, measured in transformers' own forward; resumed, with less memory,
on models of every way through their blocks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor

import leangrid
from leangrid.inference.load import load
from leangrid.planning.placement import Placement
from leangrid.progress import Event
from leangrid.recipe import Recipe
from leangrid.run.quantize import quantize

Tiny = Callable[..., Path]
WINDOWS = tiny_models.tokens(9, 32)
TUNED = Recipe(scheme="W3A16", tune=4)
LEVELS = Recipe(scheme="NU3", tune=4)
KINDS = ["qwen2", "gpt2", "bert", "qwen3_moe", "gemma3n"]  # biases, Conv1D, encoder, experts, more than states flows


def _tuning(out: Path) -> dict[str, Any]:
    return json.loads((out / "manifest.json").read_bytes())["result"]["tuning"]


def _bytes(out: Path) -> list[bytes]:
    return [(out / name).read_bytes() for name in ("model.safetensors", "records.jsonl")][:1]


def _states(directory: Path, windows: Tensor) -> list[Tensor]:
    """What transformers' own forward gives out after each block, float64."""
    model, _ = load(directory, dtype=torch.float32)
    found: list[Tensor] = []
    base = model.base_model
    layers = next(m for m in base.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == tiny_models.BLOCKS)
    hooks = [layer.register_forward_hook(lambda _, __, y: found.append(y[0] if isinstance(y, tuple) else y))
             for layer in layers]  # fmt: skip
    with torch.no_grad():
        model(windows)
    for hook in hooks:
        hook.remove()
    return [state.double() for state in found]


@pytest.mark.parametrize("name", ["llama2", "gpt2", "qwen3_moe"])
def test_the_error_on_held_out_windows_is_that_of_the_written_result(name: str, tiny: Tiny, tmp_path: Path) -> None:
    quantize(tiny(name), tmp_path / "out", TUNED if name == "llama2" else LEVELS, windows=WINDOWS)
    found = _tuning(tmp_path / "out")
    assert found["tuned"] > 0
    assert found["held_error"] < 1
    held = WINDOWS[-1:]  # one of nine
    theirs, ours = _states(tiny(name), held), _states(tmp_path / "out", held)
    for block, one in enumerate(found["blocks"]):
        off = (ours[block] - theirs[block]).square().sum(-1) / theirs[block].square().sum(-1)
        assert float(off.mean()) == pytest.approx(one["held_after"], rel=0.02), block


@pytest.mark.parametrize(
    "name",
    ["gemma3n", "qwen3_moe", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen2", "gpt2", "bert"))],
)
def test_a_stopped_run_ends_in_the_same_bytes(name: str, tiny: Tiny, tmp_path: Path) -> None:
    def stop(event: Event) -> None:
        if event.stage == "block" and event.block == 0:
            raise KeyboardInterrupt

    windows = tiny_models.tokens(17, 32)
    quantize(tiny(name), tmp_path / "whole", LEVELS, windows=windows)
    with pytest.raises(KeyboardInterrupt):
        quantize(tiny(name), tmp_path / "out", LEVELS, windows=windows, progress=stop)
    result = quantize(tiny(name), tmp_path / "out", LEVELS, windows=windows)
    assert _bytes(tmp_path / "out") == _bytes(tmp_path / "whole")
    assert result.tuning == _tuning(tmp_path / "whole")
    assert result.tuning["tuned"] + result.tuning["kept"] == len(result.tuning["blocks"])
    assert result.tuning["tuned"] > 0
    # Two of Gemma 3n's blocks put keys and values into a dictionary that they are given.
    changing = [one for one in result.tuning["trouble"] if "changes what it is called with" in one]
    assert len(changing) == len(result.tuning["trouble"]) == (2 if name == "gemma3n" else 0)


@pytest.mark.parametrize(
    "placement",
    [Placement(3), Placement(2, replay=True), Placement(4, replay=True, host_streams=True, disk_streams=True)],
)
def test_the_placement_changes_no_byte(placement: Placement, tiny: Tiny, tmp_path: Path) -> None:
    for out, where in (("one", None), ("other", placement)):
        quantize(tiny("llama2"), tmp_path / out, TUNED, windows=WINDOWS, placement=where)
    assert _bytes(tmp_path / "one") == _bytes(tmp_path / "other")


def test_held_out_windows_are_in_no_hessian(tiny: Tiny, tmp_path: Path) -> None:
    quantize(tiny("llama2"), tmp_path / "out", TUNED, windows=WINDOWS)
    records = [json.loads(line) for line in (tmp_path / "out" / "records.jsonl").read_text().splitlines()]
    assert {record["tokens"] for record in records} == {8 * 32}


def test_without_the_correction_blocks_are_tuned_towards_the_original_stream(tiny: Tiny, tmp_path: Path) -> None:
    result = quantize(tiny("llama2"), tmp_path / "out", Recipe(scheme="W3A16", tune=4, correct=0.0), windows=WINDOWS)
    assert result.tuning["tuned"] > 0


@pytest.mark.fault("N13")
def test_windows_too_few_to_hold_some_out_are_said(tiny: Tiny, tmp_path: Path) -> None:
    events: list[Event] = []
    plain = quantize(tiny("llama2"), tmp_path / "plain", Recipe(scheme="W3A16"), windows=WINDOWS[:3])
    result = quantize(tiny("llama2"), tmp_path / "out", TUNED, windows=WINDOWS[:3], progress=events.append)
    assert result.tuning["kept"] == 2
    assert "3 windows are too few" in result.tuning["trouble"][0]
    assert any("3 windows are too few" in event.message for event in events)
    assert result.loss == pytest.approx(plain.loss, rel=1e-3)  # batches of one window: sums in another order


def test_a_block_that_is_called_twice_stays_as_solved_and_says_so(tiny: Tiny, tmp_path: Path) -> None:
    result = quantize(tiny("albert"), tmp_path / "out", TUNED, windows=WINDOWS)
    assert all("more than once" in sentence for sentence in result.tuning["trouble"])
    assert result.tuning["trouble"]


def test_summary_and_card_say_what_tuning_did(tiny: Tiny, tmp_path: Path) -> None:
    quantize(tiny("llama2"), tmp_path / "out", TUNED, windows=WINDOWS)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "tuned | 2 blocks: their error fell to 0." in card


def test_a_recipe_without_tuning_keeps_its_fingerprint() -> None:
    assert leangrid.Recipe(tune=0).fingerprint() == leangrid.Recipe().fingerprint()
    assert leangrid.Recipe(tune=1).fingerprint() != leangrid.Recipe().fingerprint()

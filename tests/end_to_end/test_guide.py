"""Block tuning that is guided by what the model's predictions feel (``guide``)."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

from leangrid.errors import RecipeError
from leangrid.inference.load import load
from leangrid.metrics.fisher import draw_gradients
from leangrid.planning.placement import Placement
from leangrid.progress import Event
from leangrid.recipe import Recipe
from leangrid.run import draw_guide, inputs
from leangrid.run import quantize as quantize_module
from leangrid.run.guide import Guide
from leangrid.run.quantize import quantize
from leangrid.solve.gradient import NoGradient

Tiny = Callable[..., Path]
WINDOWS = tiny_models.tokens(9, 32)
GUIDED = Recipe(scheme="W3A16", tune=2, guide=2)
LEVELS = Recipe(scheme="NU3", tune=2, guide=2)


def _stored(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


def _tuning(out: Path) -> dict[str, Any]:
    return json.loads((out / "manifest.json").read_bytes())["result"]["tuning"]


@pytest.mark.parametrize("name", ["llama2", "gpt2", "bert", "qwen3_moe", "gemma3n"])
def test_the_gradients_are_those_of_transformers_own_model(
    name: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Guide] = []

    def keep(run: Any) -> Guide | None:
        kept.append(draw_guide.draw_guide(run) or pytest.fail("nothing was drawn"))
        kept.append(Guide(kept[0]._drawn, run.states.get))
        return kept[0]

    monkeypatch.setattr(quantize_module, "draw_guide", keep)
    quantize(tiny(name), tmp_path / "out", LEVELS.model_copy(update={"seed": 3}), windows=WINDOWS)
    model, _ = load(tiny(name), dtype=torch.float32)
    layers = next(m for m in model.base_model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) > 1)
    states: list[torch.Tensor] = []

    def hold(module: Any, args: Any, output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    for layer in layers:
        layer.register_forward_hook(hold)
    for window in (0, 8):
        states.clear()
        model.requires_grad_(True)
        output = model(WINDOWS[window : window + 1])
        predicts = "logits" in output
        given = output.logits if predicts else output.last_hidden_state
        generator = torch.Generator().manual_seed(3 * 1_000_003 + window)
        wanted = draw_gradients(given, states, 2, generator, predicts)
        for block, gradients in enumerate(wanted):
            found = kept[1]._drawn[block][window].float()
            gradients = gradients if name == "gemma3n" else gradients[:, 0]  # whose states have streams before windows
            assert found.shape == gradients.shape
            off = (found - gradients).norm() / gradients.norm().clamp(min=1e-12)
            assert float(off) < 0.01, block  # bfloat16


@pytest.mark.parametrize("name", ["qwen2", "bert", "qwen3_moe", pytest.param("gemma3n", marks=pytest.mark.slow)])
def test_a_stopped_run_ends_in_the_same_bytes(name: str, tiny: Tiny, tmp_path: Path) -> None:
    def stop(event: Event) -> None:
        if event.stage == "block" and event.block == 0:
            raise KeyboardInterrupt

    quantize(tiny(name), tmp_path / "whole", LEVELS, windows=WINDOWS)
    with pytest.raises(KeyboardInterrupt):
        quantize(tiny(name), tmp_path / "out", LEVELS, windows=WINDOWS, progress=stop)
    quantize(tiny(name), tmp_path / "out", LEVELS, windows=WINDOWS)
    assert _stored(tmp_path / "out") == _stored(tmp_path / "whole")
    assert _tuning(tmp_path / "out")["blocks"] == _tuning(tmp_path / "whole")["blocks"]


@pytest.mark.parametrize(
    "placement",
    [Placement(3), Placement(2, replay=True), Placement(4, replay=True, host_streams=True, disk_streams=True)],
)
def test_the_placement_changes_no_byte(placement: Placement, tiny: Tiny, tmp_path: Path) -> None:
    for out, where in (("one", None), ("other", placement)):
        quantize(tiny("llama2"), tmp_path / out, GUIDED, windows=WINDOWS, placement=where)
    assert _stored(tmp_path / "one") == _stored(tmp_path / "other")
    assert _tuning(tmp_path / "one")["tuned"] == 2


def test_it_changes_what_blocks_are_tuned_to(tiny: Tiny, tmp_path: Path) -> None:
    for out, draws in (("with", 2), ("without", 0)):
        recipe = GUIDED.model_copy(update={"guide": draws})
        quantize(tiny("llama2"), tmp_path / out, recipe, windows=WINDOWS)
    assert _stored(tmp_path / "with") != _stored(tmp_path / "without")


@pytest.mark.fault("R3")
def test_a_model_that_will_not_fit_is_refused_before_work(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "usable_device_bytes", lambda device: 1000)
    with pytest.raises(RecipeError, match=r"guide holds the whole model: about .* Use --guide 0"):
        quantize(tiny("llama2"), tmp_path / "out", GUIDED, windows=WINDOWS)
    assert not list(tmp_path.glob("out*"))


def test_nothing_is_drawn_where_nothing_is_tuned() -> None:
    assert Recipe(guide=4).resolved("NU4").draws == 0
    assert Recipe(effort="best", guide=4).resolved("NU4").draws == 4
    assert Recipe(effort="best", guide=4, tune=0).resolved("NU4").draws == 0
    assert Recipe(effort="best").resolved("NU4").draws == 0


def _without_gradient(*_: Any) -> Any:
    raise NoGradient("no gradient passes through the model's own code: as is tried here")


@pytest.mark.fault("N13")
def test_a_model_that_lets_no_gradient_through_is_tuned_by_its_blocks_alone_and_says_so(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    quantize(tiny("llama2"), tmp_path / "plain", GUIDED.model_copy(update={"guide": 0}), windows=WINDOWS)
    monkeypatch.setattr(draw_guide, "draw_gradients", _without_gradient)
    out = tmp_path / "out"
    quantize(tiny("llama2"), out, GUIDED, windows=WINDOWS, progress=lambda event: told.append(event.message))
    assert _stored(out) == _stored(tmp_path / "plain")
    assert any("tuned by their own outputs alone: no gradient passes" in words for words in told)
    kinds = [rescue["kind"] for line in (out / "records.jsonl").read_text().splitlines()
             for rescue in json.loads(line)["rescues"]]  # fmt: skip
    assert "unguided" in kinds


@pytest.mark.fault("N13")
def test_a_block_through_which_no_gradient_passes_stays_as_solved_and_says_so(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reformer computes its own gradients, and none where it is not trained."""
    inner = LlamaMLP.forward

    def cut(module: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return inner(module, x.detach())

    def attention(module: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return own(module, *args, **kwargs)

    own = LlamaAttention.forward
    monkeypatch.setattr(LlamaMLP, "forward", cut)
    monkeypatch.setattr(LlamaAttention, "forward", attention)
    recipe = GUIDED.model_copy(update={"finish": 1})
    result = quantize(tiny("llama2"), tmp_path / "out", recipe, windows=WINDOWS)
    assert result.tuning["tuned"] == 0
    assert all("no gradient passes through the model's own code" in why for why in result.tuning["trouble"])
    assert "no gradient passes" in result.finish["trouble"]

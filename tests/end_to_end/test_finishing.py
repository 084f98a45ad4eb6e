"""Grids tuned by the whole model's output (``finish``): what the result predicts, in transformers' own forward."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor

from leangrid.errors import Interrupted, RecipeError
from leangrid.inference.load import load
from leangrid.models.whole import WholeModel
from leangrid.planning.placement import Placement
from leangrid.progress import Event
from leangrid.recipe import Recipe
from leangrid.run import inputs
from leangrid.run.quantize import quantize
from leangrid.storage import failpoints
from leangrid.storage.safetensors import load as load_tensors

Tiny = Callable[..., Path]
WINDOWS = tiny_models.tokens(9, 32)
FINISHED = Recipe(scheme="W3A16", finish=4)
LEVELS = Recipe(scheme="NU3", finish=4)


def _finish(out: Path) -> dict[str, Any]:
    return json.loads((out / "manifest.json").read_bytes())["result"]["finish"]


def _output(directory: Path, windows: Tensor) -> Tensor:
    """Logits, or the last hidden states, by transformers' own forward, float64."""
    model, _ = load(directory, dtype=torch.float32)
    with torch.no_grad():
        found = model(windows)
    return (found.logits if "logits" in found else found.last_hidden_state).double()


def _distance(result: Path, source: Path, windows: Tensor, encoder: bool) -> float:
    theirs, ours = _output(source, windows), _output(result, windows)
    if encoder:
        return float(((ours - theirs).square().sum(-1) / theirs.square().sum(-1)).mean())
    p, q = theirs.log_softmax(-1), ours.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize(
    "name",
    [
        "llama2",
        "qwen3_moe",
        "gemma3n",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "bert", "albert")),
    ],
)
def test_the_distance_on_held_out_windows_is_that_of_the_written_result(name: str, tiny: Tiny, tmp_path: Path) -> None:
    result = quantize(tiny(name), tmp_path / "out", FINISHED if name == "llama2" else LEVELS, windows=WINDOWS)
    found = _finish(tmp_path / "out")
    assert found == result.finish
    if name != "gemma3n":  # there the random text that is held out gains nothing
        assert found["best"] > 0
        assert found["held_after"] < found["held_before"]
        assert found["after"] < found["before"]
    encoder = name in ("bert", "albert")
    for windows, figure in ((WINDOWS[-1:], "held_after"), (WINDOWS[:1], "after")):
        measured = _distance(tmp_path / "out", tiny(name), windows, encoder)
        assert measured == pytest.approx(found[figure], rel=0.01), figure


@pytest.mark.parametrize(
    "name", ["qwen3_moe", "albert", *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama2", "gpt2"))]
)
def test_one_block_at_once_gives_the_same_bytes(name: str, tiny: Tiny, tmp_path: Path) -> None:
    outs, recipe = [], FINISHED if name == "llama2" else LEVELS
    for replay in (False, True):
        outs.append(tmp_path / f"out-{replay}")
        quantize(tiny(name), outs[-1], recipe, windows=WINDOWS, placement=Placement(1, replay=replay))
    stored = [(out / "model.safetensors").read_bytes() for out in outs]
    assert stored[0] == stored[1]
    assert _finish(outs[0]) == _finish(outs[1])
    assert _finish(outs[0])["best"] > 0


def _too_large(*_: Any) -> Tensor:
    raise torch.OutOfMemoryError("not enough memory")


@pytest.mark.fault("R1")
def test_where_memory_runs_out_one_block_at_once_is_taken_and_said(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    quantize(tiny("llama2"), tmp_path / "whole", FINISHED, windows=WINDOWS)
    monkeypatch.setattr(WholeModel, "with_weights", _too_large)
    out = tmp_path / "out"
    quantize(tiny("llama2"), out, FINISHED, windows=WINDOWS, progress=lambda event: told.append(event.message))
    words = "memory ran out: one block's weights at once instead of all"
    assert f"finishing: {words}" in told
    assert _finish(out) == _finish(tmp_path / "whole") | {"memory": words}
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert words in (out / "README.md").read_text()


@pytest.mark.fault("R1")
def test_where_that_is_too_much_as_well_finished_blocks_are_kept(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(tiny("llama2"), tmp_path / "whole", FINISHED, windows=WINDOWS)
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="out of memory while the whole model"):
        patch.setattr(WholeModel, "with_weights", _too_large)
        patch.setattr(WholeModel, "with_weights_by_blocks", _too_large)
        quantize(tiny("llama2"), tmp_path / "out", FINISHED, windows=WINDOWS)
    quantize(tiny("llama2"), tmp_path / "out", FINISHED, windows=WINDOWS)
    stored = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("out", "whole")]
    assert stored[0] == stored[1]


def _stop_when(words: str) -> Callable[[Event], None]:
    def stop(event: Event) -> None:
        if words in event.message:
            raise KeyboardInterrupt

    return stop


_BEGUN, _HALF = "finishing: 4 passes", "after pass 2"


@pytest.mark.parametrize(
    ("name", "words"),
    [("qwen2", _BEGUN), ("bert", _HALF), ("qwen3_moe", _BEGUN), pytest.param("gemma3n", _HALF, marks=pytest.mark.slow)],
)
def test_a_stopped_run_ends_in_the_same_bytes(name: str, words: str, tiny: Tiny, tmp_path: Path) -> None:
    quantize(tiny(name), tmp_path / "whole", LEVELS, windows=WINDOWS)
    with pytest.raises(KeyboardInterrupt):
        quantize(tiny(name), tmp_path / "out", LEVELS, windows=WINDOWS, progress=_stop_when(words))
    quantize(tiny(name), tmp_path / "out", LEVELS, windows=WINDOWS)
    stored = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("out", "whole")]
    assert stored[0] == stored[1]
    assert _finish(tmp_path / "out") == _finish(tmp_path / "whole")


@pytest.mark.parametrize("name", ["qwen2", pytest.param("gemma3n", marks=pytest.mark.slow)])
def test_a_run_that_is_stopped_while_it_is_published_is_not_finished_again(
    name: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(tiny(name), tmp_path / "whole", LEVELS, windows=WINDOWS)
    failpoints.reset()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setenv("LEANGRID_FAILPOINT", "publish.before_manifest:1:raise:SIGINT")
        quantize(tiny(name), tmp_path / "out", LEVELS, windows=WINDOWS)
    told: list[str] = []
    quantize(tiny(name), tmp_path / "out", LEVELS, windows=WINDOWS, progress=lambda event: told.append(event.message))
    assert "resuming after the last block" in told and not any("finishing" in words for words in told)
    stored = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("out", "whole")]
    assert stored[0] == stored[1]
    assert _finish(tmp_path / "out") == _finish(tmp_path / "whole")


@pytest.mark.parametrize(
    ("scheme", "container", "moving"),
    [
        ("RTN4_G32", "compressed-tensors", "weight_scale"),
        ("RTN3_G32", "mlx", "scales"),
        ("RTN4_G32", "gptq", "scales"),
        ("RTN4_G32", "awq", "scales"),
        ("NU3", "lut", "lut"),
        ("RTN_Q4_0", "gguf", None),
        ("RTN_Q3_K", "gguf", None),
    ],
)
def test_codes_stay_and_every_container_holds_the_moved_grids(
    scheme: str, container: str, moving: str | None, tiny: Tiny, tmp_path: Path
) -> None:
    """Grids of plain rounding leave much to gain; learned ones of a model with random weights do not."""
    recipe, source = Recipe(scheme=scheme, format=container, finish=4), tiny("gpt2" if scheme == "NU3" else "llama2")
    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "out", recipe, windows=WINDOWS, progress=_stop_when("finishing: 4"))
    before = {}
    for block in sorted((tmp_path / "out.partial" / "blocks").glob("*.safetensors")):
        before |= load_tensors(block)
    quantize(source, tmp_path / "out", recipe, windows=WINDOWS)
    after = load_tensors(tmp_path / "out" / "model.safetensors")
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed
    if moving is not None:
        ends = {name.rpartition(".")[2] for name in changed}
        assert moving in ends and "norm" not in str(changed)
        assert ends <= {moving, "biases", "weight"} if container in ("mlx", "lut") else ends == {moving}
    measured = _distance(tmp_path / "out", source, WINDOWS[-1:], encoder=False)
    assert measured == pytest.approx(_finish(tmp_path / "out")["held_after"], rel=0.01)


@pytest.mark.parametrize("placement", [Placement(3), Placement(2, replay=True, host_streams=True, disk_streams=True)])
def test_the_placement_changes_no_byte(placement: Placement, tiny: Tiny, tmp_path: Path) -> None:
    recipe = FINISHED.model_copy(update={"tune": 2, "correct": "auto"})
    for out, where in (("one", None), ("other", placement)):
        quantize(tiny("llama2"), tmp_path / out, recipe, windows=WINDOWS, placement=where)
    stored = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("one", "other")]
    assert stored[0] == stored[1]


def test_the_report_shows_the_row_as_it_is_stored(tiny: Tiny, tmp_path: Path) -> None:
    quantize(tiny("llama2"), tmp_path / "out", LEVELS, windows=WINDOWS)
    run = json.loads((tmp_path / "out" / "run.json").read_bytes())
    sample = run["sample"]
    model, _ = load(tmp_path / "out", dtype=torch.float32, dense=True)
    weight: Any = model.get_submodule(sample["name"]).weight
    assert sample["stored"] == pytest.approx(weight[sample["row"]][sample["shown"]].tolist(), rel=1e-3)
    assert set(sample["stored"]) <= set(sample["levels"])


@pytest.mark.fault("N13")
def test_windows_too_few_to_hold_some_out_are_said(tiny: Tiny, tmp_path: Path) -> None:
    events: list[Event] = []
    result = quantize(tiny("llama2"), tmp_path / "out", FINISHED, windows=WINDOWS[:3], progress=events.append)
    assert "3 windows are too few" in result.finish["trouble"]
    assert any("3 windows are too few" in event.message for event in events)


def test_a_model_that_memory_will_not_hold_is_refused_before_work(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "usable_device_bytes", lambda _device: 1 << 16)
    with pytest.raises(RecipeError, match=r"finish holds the whole model: about .* GiB"):
        quantize(tiny("llama2"), tmp_path / "out", FINISHED, windows=WINDOWS)
    assert list(tmp_path.iterdir()) == []

"""Out of memory in the middle of a block: the run takes one smaller placement after another, each is recorded, and the
result is the same."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from live_bytes import LiveBytes
from safetensors.torch import load_file
from transformers.models.llama.modeling_llama import LlamaMLP

from leangrid.errors import Interrupted
from leangrid.models.walk import BlockWalk
from leangrid.planning.placement import Placement
from leangrid.progress import Event
from leangrid.recipe import Recipe
from leangrid.run import algebra
from leangrid.run.quantize import quantize
from leangrid.run.result import QuantizeResult
from leangrid.solve import in_place

WINDOWS, RECIPE = tiny_models.tokens(6, 32), Recipe(scheme="NU4")
Exhaust = Callable[[Any, str, Callable[..., bool]], list[int]]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny_models.save("llama2", tmp_path / "source")


@pytest.fixture
def exhaust(monkeypatch: pytest.MonkeyPatch) -> Exhaust:
    """``exhaust(owner, name, when)``: calls of owner.name for which ``when`` of its arguments holds run out of memory;
    counts them."""

    def patch(owner: Any, name: str, when: Callable[..., bool]) -> list[int]:
        real, failures = getattr(owner, name), [0]

        def failing(*args: Any, **kwargs: Any) -> Any:
            if when(*args, **kwargs):
                failures[0] += 1
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, failing)
        return failures

    return patch


@pytest.fixture
def two_memories(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the device were another place than the CPU: the last reductions, and weights read ahead, are used."""
    _pretend_own_memory(monkeypatch)


def _pretend_own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("run", "less_memory"):
        monkeypatch.setattr(f"leangrid.run.{module}.has_own_memory", lambda _: True)


def _run(source: Path, out: Path, placement: Placement | None = None) -> tuple[QuantizeResult, list[str]]:
    notices: list[str] = []

    def told(event: Event) -> None:
        if event.stage == "notice" and "memory" in event.message:
            notices.append(event.message)

    return quantize(source, out, RECIPE, windows=WINDOWS, progress=told, placement=placement), notices


def _codes(out: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor for name, tensor in load_file(out / "model.safetensors").items() if tensor.dtype == torch.int32
    }


def _same(out: Path, other: Path) -> None:
    """Two results hold the same codes."""
    ours, theirs = _codes(out), _codes(other)
    assert ours.keys() == theirs.keys() and len(ours) == 14
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def _records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]


@pytest.mark.fault("R1")
def test_batches_are_made_smaller_first(source: Path, tmp_path: Path, exhaust: Exhaust) -> None:
    _run(source, tmp_path / "expected", Placement(1))
    failures = exhaust(LlamaMLP, "forward", lambda _self, x: x.shape[0] > 1)
    result, notices = _run(source, tmp_path / "out", Placement(4))
    assert failures == [2], "4 windows, 2, 1; not tried again in the second block"
    assert ["2 instead of 4 windows" in notices[0], "1 instead of 2 windows" in notices[1], len(notices)] == [
        True,
        True,
        2,
    ]
    assert (
        result.notes["memory"] == 14 and result.exit_code == 0
    )  # both steps stand in each of the first block's 7 records
    kinds = [[r["kind"] for r in record["rescues"]].count("memory") for record in _records(tmp_path / "out")]
    assert kinds == [2] * 7 + [0] * 7
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert len(manifest["memory"]) == 2 and all(
        step.startswith("model.layers.0: out of memory: ") for step in manifest["memory"]
    )
    _same(tmp_path / "out", tmp_path / "expected")


@pytest.mark.fault("R1")
def test_replaying_instead_of_pausing_gives_the_same_bits(source: Path, tmp_path: Path, exhaust: Exhaust) -> None:
    _run(source, tmp_path / "expected", Placement(1))
    failures = exhaust(BlockWalk, "_together", lambda _self, _original, _quantized, group: group == 3)
    _, notices = _run(source, tmp_path / "out", Placement(1))
    assert failures == [1] and "replayed for each group instead of paused" in notices[0]
    _same(tmp_path / "out", tmp_path / "expected")


@pytest.mark.fault("R1")
@pytest.mark.parametrize("replay", [False, True])
def test_a_failed_attempt_leaves_nothing_behind(
    source: Path, tmp_path: Path, exhaust: Exhaust, monkeypatch: pytest.MonkeyPatch, replay: bool
) -> None:
    after: list[int] = []
    with LiveBytes() as alive:
        monkeypatch.setattr("leangrid.run.less_memory.release_cached_memory", lambda _: after.append(alive.now))
        exhaust(BlockWalk, "_resume", lambda _self, one, group: group == 3 and len(after) < 1)
        quantize(source, tmp_path / "out", RECIPE, windows=WINDOWS, placement=Placement(3, replay=replay))
    states = WINDOWS.numel() * tiny_models.HIDDEN * 4  # of one stream: both are the same before the first block
    rotary = 2 * 2 * WINDOWS.shape[1] * 16 * 4
    assert len(after) == 1 and states <= after[0] < states + 4 * rotary + 4096


@pytest.mark.fault("R1")
def test_the_algebra_is_in_place_before_it_leaves_the_device(source: Path, tmp_path: Path, exhaust: Exhaust) -> None:
    _run(source, tmp_path / "expected", Placement(6, replay=True, in_place=True))
    failures = exhaust(algebra, "factorize", lambda *_: True)
    _, notices = _run(source, tmp_path / "out")
    assert failures == [2] and "three matrices" in notices[1]
    _same(tmp_path / "out", tmp_path / "expected")


@pytest.mark.fault("R1")
@pytest.mark.usefixtures("two_memories")
def test_one_group_moves_to_the_cpu_then_the_block(
    source: Path, tmp_path: Path, exhaust: Exhaust, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_place_placement = Placement(6, replay=True, host_streams=True, in_place=True)
    _run(source, tmp_path / "expected", in_place_placement)
    calls: list[int] = []
    real = in_place.factorize_in_place

    def wide_only_once_on_the_device(matrix: torch.Tensor, *rest: Any) -> Any:
        calls.append(len(matrix))
        if len(matrix) == 128 and calls.count(128) == 1:  # the down projection's
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(matrix, *rest)

    monkeypatch.setattr(in_place, "factorize_in_place", wide_only_once_on_the_device)
    _, notices = _run(source, tmp_path / "group", in_place_placement)
    assert len(notices) == 1 and "Hessian and factor of group 3 on the CPU" in notices[0]
    _same(tmp_path / "group", tmp_path / "expected")
    monkeypatch.undo()
    _pretend_own_memory(monkeypatch)
    alone = Placement(1, replay=True, host_streams=True, in_place=True)
    _run(source, tmp_path / "one by one", alone)
    left = [False] * 40 + [True] * 2  # in the middle of the second block, and at once when it begins again
    failures = exhaust(LlamaMLP, "forward", lambda *_: bool(left) and left.pop(0))
    _, notices = _run(source, tmp_path / "block", alone)
    assert failures == [2] and ["all groups on the CPU" in notices[0], "the whole block on the CPU" in notices[1]] == [
        True,
        True,
    ]
    _same(tmp_path / "block", tmp_path / "one by one")


@pytest.mark.fault("R1")
@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling",
        pytest.param("DefaultCPUAllocator: can't allocate memory", marks=pytest.mark.slow),
    ],
)
def test_where_nothing_smaller_is_left_one_sentence_says_so_and_the_run_goes_on(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, message: str
) -> None:
    expected, _ = _run(source, tmp_path / "expected")
    second = []
    real = LlamaMLP.forward

    def full(self: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
        if second:
            raise RuntimeError(message)
        return real(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", full)
    with pytest.raises(
        Interrupted, match=r"no smaller way is left: a block needs about .* GiB \(model\.layers\.1\)"
    ) as stop:
        quantize(
            source,
            tmp_path / "out",
            RECIPE,
            windows=WINDOWS,
            progress=lambda e: second.append(1) if e.stage == "block" else None,
        )
    assert stop.value.exit_code == 3
    second.clear()
    result, _ = _run(source, tmp_path / "out")
    assert result.loss == pytest.approx(expected.loss, rel=1e-3)
    _same(tmp_path / "out", tmp_path / "expected")


@pytest.mark.fault("R1")
def test_a_resumed_run_keeps_the_smaller_placement(source: Path, tmp_path: Path, exhaust: Exhaust) -> None:
    exhaust(LlamaMLP, "forward", lambda _self, x: x.shape[0] > 2)

    def stop(event: Event) -> None:
        if event.stage == "block":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "out", RECIPE, windows=WINDOWS, progress=stop, placement=Placement(4))
    result, notices = _run(source, tmp_path / "out")
    assert notices == [] and result.notes["memory"] == 7


def test_other_errors_are_not_taken_for_missing_memory(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(algebra, "factorize", broken)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        _run(source, tmp_path / "out")

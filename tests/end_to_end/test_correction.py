"""The share of the correction that is measured, in whole runs: against the slow twin on what the linears read, the same
for every way through the blocks, and said in records, manifest and card."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import forked_ranks
import pytest
import tiny_models
import torch
from forked_ranks import as_command
from reference import reference_share
from safetensors.torch import load_file
from torch import Tensor

from leangrid.planning.placement import Placement
from leangrid.progress import Event
from leangrid.recipe import Recipe
from leangrid.run.quantize import quantize
from leangrid.solve.hessian import HessianSum

Tiny = Callable[..., Path]
WINDOWS = tiny_models.tokens(9, 32)  # four and five
EVEN = tiny_models.tokens(10, 32)
HALF = len(WINDOWS) // 2
AUTO = Recipe(scheme="W3A16", correct="auto")
IN_PLACE = Placement(2, replay=True, host_streams=True, in_place=True)
WAYS = [Placement(9), Placement(3), Placement(2, replay=True), IN_PLACE]


def shares(out: Path) -> dict[str, float]:
    """Name -> share of every layer."""
    lines = (json.loads(line) for line in (out / "records.jsonl").read_text().splitlines())
    return {line["name"]: line["correct"] for line in lines}


class Read:
    """What each linear of a run read in both streams, in the order in which it was summed."""

    def __init__(self) -> None:
        self.pairs: list[list[tuple[Tensor, Tensor]]] = []  # a Hessian
        made, added = HessianSum.__init__, HessianSum.add_pair

        def make(total: HessianSum, *arguments: Any, **named: Any) -> None:
            made(total, *arguments, **named)
            if total._cross is not None:
                self.pairs.append([])

        def add(total: HessianSum, original: Tensor, quantized: Tensor) -> None:
            self.pairs[-1].append((original.clone(), quantized.clone()))
            added(total, original, quantized)

        self._patches = (patch.object(HessianSum, "__init__", make), patch.object(HessianSum, "add_pair", add))

    def __enter__(self) -> "Read":
        for one in self._patches:
            one.start()
        return self

    def __exit__(self, *_: object) -> None:
        for one in self._patches:
            one.stop()

    def share(self, group: int, weight: Tensor) -> float:
        """The slow twin's, of a linear of a group. The windows come in order, once for each call of the block."""
        original, quantized = (torch.cat(stream) for stream in zip(*self.pairs[group], strict=True))
        first = (torch.arange(len(original)) % len(WINDOWS) < HALF).repeat_interleave(original.shape[1])
        return reference_share(weight, original.flatten(0, 1), quantized.flatten(0, 1), first, damping=0.01)


@pytest.mark.parametrize("placement", WAYS)
def test_the_share_is_that_of_the_slow_twin_whatever_the_batches(
    placement: Placement, tiny: Tiny, tmp_path: Path
) -> None:
    with Read() as read:
        quantize(tiny("llama2"), tmp_path / "out", AUTO, windows=WINDOWS, placement=placement)
    found, weights = shares(tmp_path / "out"), load_file(tiny("llama2") / "model.safetensors")
    assert len(read.pairs) == 4 * tiny_models.BLOCKS
    groups = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
    compared = 0
    for name, share in found.items():
        group = next(number for number, names in enumerate(groups) if name.endswith(names))
        block = int(name.split(".")[2])
        if (block, group) == (0, 0):  # both streams are the same
            assert share == 0
            continue
        expected = read.share(4 * block + group, weights[f"{name}.weight"])
        assert share == pytest.approx(expected, abs=2e-3), name
        compared += 0 < share < 0.5
    assert compared > 3


def test_a_block_that_is_called_three_times_has_each_window_in_one_half(tiny: Tiny, tmp_path: Path) -> None:
    with Read() as read:
        quantize(tiny("albert"), tmp_path / "out", AUTO, windows=WINDOWS, placement=Placement(3))
    weights = load_file(tiny("albert") / "model.safetensors")
    (name,) = (name for name in shares(tmp_path / "out") if name.endswith("attention.dense"))
    assert sum(len(x) for x, _ in read.pairs[1]) == 3 * len(WINDOWS)
    expected = read.share(1, weights[f"{name}.weight"])
    assert shares(tmp_path / "out")[name] == pytest.approx(expected, abs=2e-3)


def test_ranks_measure_the_share_of_one_process(tiny: Tiny, tmp_path: Path) -> None:
    """Of nine windows over two ranks the first has five: the half ends inside its part."""
    source = tiny("llama2")
    quantize(source, tmp_path / "one", AUTO, windows=WINDOWS, threads=1)
    for out, placement in (("two", None), ("in_place", IN_PLACE)):
        job = as_command(
            lambda rank, out=out, placement=placement: quantize(
                source, tmp_path / out, AUTO, windows=WINDOWS, threads=1, placement=placement
            )
        )
        ended = forked_ranks.run(2, job)
        assert all(one.status == 0 for one in ended), ended
    alone = shares(tmp_path / "one")
    for out in ("two", "in_place"):
        assert shares(tmp_path / out) == pytest.approx(alone, abs=0.05)
        first = "model.layers.0.self_attn.o_proj"
        assert shares(tmp_path / out)[first] == pytest.approx(alone[first], abs=1e-3)


@pytest.mark.parametrize("name", ["llama2", "gemma3n", "albert"])  # states alone flow, more flows, called again
def test_a_stopped_run_ends_in_the_same_bytes(name: str, tiny: Tiny, tmp_path: Path) -> None:
    def stop(event: Event) -> None:
        if event.stage == "block" and event.block == 0:
            raise KeyboardInterrupt

    where = Placement(3)
    quantize(tiny(name), tmp_path / "whole", AUTO, windows=WINDOWS, placement=where)
    if name != "albert":  # it has one block
        with pytest.raises(KeyboardInterrupt):
            quantize(tiny(name), tmp_path / "out", AUTO, windows=WINDOWS, placement=where, progress=stop)
    quantize(tiny(name), tmp_path / "out", AUTO, windows=WINDOWS, placement=where)
    whole, out = ((tmp_path / end / "model.safetensors").read_bytes() for end in ("whole", "out"))
    assert whole == out
    assert shares(tmp_path / "out") == shares(tmp_path / "whole")


def test_records_manifest_and_card_say_the_share(tiny: Tiny, tmp_path: Path) -> None:
    result = quantize(tiny("llama2"), tmp_path / "auto", AUTO, windows=WINDOWS)
    found = sorted(shares(tmp_path / "auto").values())
    assert result.correction == {"min": 0.0, "median": pytest.approx(found[len(found) // 2], abs=0.1), "max": found[-1]}
    manifest = json.loads((tmp_path / "auto" / "manifest.json").read_text())
    assert manifest["recipe"]["correct"] == "auto"
    assert manifest["result"]["correction"] == result.correction
    assert "corrected share | measured for each layer: 0." in (tmp_path / "auto" / "README.md").read_text()


def test_a_share_that_is_given_is_that_of_every_layer_but_experts(tiny: Tiny, tmp_path: Path) -> None:
    result = quantize(tiny("qwen3_moe"), tmp_path / "out", Recipe(scheme="W3A16", correct=0.25), windows=EVEN)
    assert result.correction == {}
    for name, share in shares(tmp_path / "out").items():
        assert share == (0.0 if ".experts." in name else 0.25), name


def test_experts_are_not_corrected_and_the_rest_is_measured(tiny: Tiny, tmp_path: Path) -> None:
    quantize(tiny("qwen3_moe"), tmp_path / "out", AUTO, windows=EVEN)
    found = shares(tmp_path / "out")
    assert not any(share for name, share in found.items() if ".experts." in name)
    assert any(share for name, share in found.items() if name.endswith("o_proj"))


@pytest.mark.fault("N13")
def test_one_window_takes_the_largest_share_and_says_so(tiny: Tiny, tmp_path: Path) -> None:
    events: list[Event] = []
    quantize(tiny("llama2"), tmp_path / "auto", AUTO, windows=WINDOWS[:1], progress=events.append)
    quantize(tiny("llama2"), tmp_path / "half", Recipe(scheme="W3A16", correct=0.5), windows=WINDOWS[:1])
    assert any("one calibration window" in event.message for event in events)
    assert set(shares(tmp_path / "auto").values()) == {0.5}
    one, other = ((tmp_path / out / "model.safetensors").read_bytes() for out in ("auto", "half"))
    assert one == other


def test_tuning_holds_out_windows_of_the_second_half(tiny: Tiny, tmp_path: Path) -> None:
    quantize(tiny("llama2"), tmp_path / "out", AUTO.model_copy(update={"tune": 1}), windows=WINDOWS)
    assert any(0 < share <= 0.5 for share in shares(tmp_path / "out").values())

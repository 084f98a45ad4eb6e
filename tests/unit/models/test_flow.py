"""Hidden states from block to block: each block alone, or the model's own forward stopped at its blocks."""

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from walks import enter, go_on, skeleton_of, walk_through

from leangrid.errors import ArchitectureError
from leangrid.models.flow import ChainedFlow, Flow, LiveFlow, open_flow
from leangrid.models.skeleton import Skeleton
from leangrid.models.streams import Streams
from leangrid.storage.mapped import MappedTensors

IDS = tiny_models.tokens(3, 24)


def _states(skeleton: Skeleton, flow: Flow) -> list[torch.Tensor]:
    """What enters each block in turn, and what leaves the last."""
    states = flow.enter(IDS.split(2), lambda hidden: hidden, "quantized")
    seen = [x.clone() for x in states]
    for index in skeleton.structure.order:
        with skeleton.load_block(index) as block:
            left = [flow.call("quantized", batch, index, block, hidden) for batch, hidden in enumerate(states)]
        seen += [x.clone() for x in left]
        _, states = flow.advance("quantized", left)
    return seen


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama3", "gemma3", "gpt2", "bert", "qwen3_moe"])
def test_both_flows_give_the_same_bits_where_states_are_all_that_flows(name: str, tmp_path: Path) -> None:
    skeleton = skeleton_of(name, tmp_path)
    assert isinstance(open_flow(skeleton), ChainedFlow)
    chained, live = _states(skeleton, ChainedFlow(skeleton)), None
    flow = LiveFlow(skeleton)
    try:
        live = _states(skeleton, flow)
    finally:
        flow.close()
    assert len(chained) == len(live) == 2 * (len(skeleton.blocks) + 1)
    assert all(map(torch.equal, chained, live))
    assert all("forward" not in vars(block) for block in skeleton.blocks)
    assert all(parameter.is_meta for parameter in skeleton.model.parameters()), "a weight stayed in memory"


@torch.no_grad()
@pytest.mark.parametrize("name", tiny_models.FLOWING)
def test_a_held_forward_ends_where_the_model_ends(name: str, tmp_path: Path) -> None:
    skeleton = skeleton_of(name, tmp_path)
    flow = open_flow(skeleton)
    assert isinstance(flow, LiveFlow) and not flow.waits and skeleton.structure.flows
    _states(skeleton, flow)
    ends: list[Any] = flow.finals("quantized")
    flow.close()
    base: Any = tiny_models.build(name).base_model
    for ids, end in zip(IDS.split(2), ends, strict=True):
        torch.testing.assert_close(end.last_hidden_state, base(ids).last_hidden_state, rtol=0, atol=1e-5)
    assert flow.finals("quantized") == []


@torch.no_grad()
def test_streams_keep_what_flows_apart(tmp_path: Path) -> None:
    """Gemma 3n's later blocks read keys of earlier ones: the original stream must not see the quantized one's."""
    skeleton = skeleton_of("gemma3n", tmp_path)
    flow, streams = enter(skeleton, IDS.split(2))
    noise = torch.Generator().manual_seed(0)
    for index in range(len(skeleton.blocks)):
        with skeleton.load_block(index) as block:
            walk = walk_through(skeleton, block, flow, index, streams)
            for group in walk:
                for linear in group.names:
                    weight = block.get_parameter(f"{linear}.weight")
                    walk.replace(linear, weight + 0.05 * torch.randn(weight.shape, generator=noise))
            left = walk.finished()
        streams = go_on(flow, left)
    ours, theirs = flow.finals("quantized"), flow.finals("original")
    flow.close()
    expected: Any = tiny_models.build("gemma3n").base_model(IDS[:2])
    torch.testing.assert_close(theirs[0].last_hidden_state, expected.last_hidden_state, rtol=0, atol=1e-5)
    assert (ours[0].last_hidden_state - theirs[0].last_hidden_state).abs().max() > 1e-3


@torch.no_grad()
def _walked(skeleton: Skeleton, replay: bool) -> list[torch.Tensor]:
    flow, streams = enter(skeleton, IDS.split(1))
    noise, seen = torch.Generator().manual_seed(0), []
    for index in range(len(skeleton.blocks)):
        with skeleton.load_block(index) as block:
            walk = walk_through(skeleton, block, flow, index, streams, replay)
            for group in walk:
                seen += [x.clone() for pair in group for x in pair if x is not None]
                for linear in group.names:
                    weight = block.get_parameter(f"{linear}.weight")
                    walk.replace(linear, weight + 0.05 * torch.randn(weight.shape, generator=noise))
            left: Streams = walk.finished()
        seen += [*left.quantized, *(left.original or [])]
        streams = go_on(flow, left)
    flow.close()
    return seen


def test_replaying_and_pausing_a_held_forward_give_the_same_bits(tmp_path: Path) -> None:
    skeleton = skeleton_of("gemma3n", tmp_path)
    paused, replayed = (_walked(skeleton, replay) for replay in (False, True))
    assert len(paused) == len(replayed) > 0 and all(map(torch.equal, paused, replayed))


@torch.no_grad()
def test_arguments_are_recorded_once_for_each_number_of_windows(tmp_path: Path) -> None:
    skeleton = skeleton_of("llama3", tmp_path)
    flow = ChainedFlow(skeleton)
    states = flow.enter(IDS.split(3), lambda hidden: hidden, "quantized")
    flow.prepare(IDS, Streams(list(states[0].split([1, 1, 1])), None), 0)
    flow.prepare(IDS, Streams(states, None), 0)
    with skeleton.load_block(0) as block:
        whole = flow.call("quantized", 0, 0, block, states[0])
        alone = flow.call("quantized", 0, 0, block, states[0][:1])
        torch.testing.assert_close(whole[:1], alone, rtol=0, atol=1e-5)
        with pytest.raises(KeyError):
            flow.call("quantized", 0, 0, block, states[0][:2])


@torch.no_grad()
def test_a_flow_that_is_closed_can_begin_again(tmp_path: Path) -> None:
    skeleton = skeleton_of("gemma3n", tmp_path)
    flow = open_flow(skeleton)
    first = flow.enter(IDS.split(2), lambda hidden: hidden, "quantized")
    again = flow.enter(IDS.split(2), lambda hidden: hidden, "quantized")
    assert all(map(torch.equal, first, again))
    flow.close()
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("name", ["gemma3n", "llama3"])
def test_states_of_a_held_forward_wait_where_they_are_put(name: str, tmp_path: Path) -> None:
    """In mapped files here; the model's own code has the same tensors, and goes on with the same numbers."""
    skeleton = skeleton_of(name, tmp_path / "model")
    plain, mapped = LiveFlow(skeleton), MappedTensors(tmp_path)
    expected = _states(skeleton, plain)
    plain.close()
    flow = LiveFlow(skeleton, get=mapped.load_copy)
    states = flow.enter(IDS.split(2), mapped.store, "quantized")
    seen = [x.clone() for x in states]
    for index in skeleton.structure.order:
        assert all(mapped.store(x) is x for x in states), "states entered a block from memory"
        with skeleton.load_block(index) as block:
            for batch, hidden in enumerate(states):  # a trial leaves everything as it is
                flow.call("quantized", batch, index, block, hidden, trial=True)
            left = [flow.call("quantized", batch, index, block, hidden) for batch, hidden in enumerate(states)]
        assert all(mapped.store(x) is x for x in (*states, *left)), "states wait in memory"
        seen += [x.clone() for x in left]
        _, states = flow.advance("quantized", left)
    flow.close()
    assert len(seen) == len(expected) and all(map(torch.equal, seen, expected))


@torch.no_grad()
def test_a_pass_that_goes_another_way_than_it_was_seen_to_is_refused(tmp_path: Path) -> None:
    skeleton = skeleton_of("gemma3n", tmp_path)
    flow = open_flow(skeleton)
    states = flow.enter(IDS.split(2), lambda hidden: hidden, "quantized")
    with skeleton.load_block(1) as block, pytest.raises(ArchitectureError, match="called in another order"):
        flow.call("quantized", 0, 1, block, states[0])
    flow.close()

"""The walk through a block: every architecture, both streams, each product once."""

import weakref
from pathlib import Path

import pytest
import tiny_models
import torch
from walks import enter, skeleton_of, walk_through

from leangrid.errors import ArchitectureError, CalibrationError
from leangrid.models.discovery import FoundBlock
from leangrid.models.flow import ChainedFlow
from leangrid.models.skeleton import Skeleton
from leangrid.models.streams import Streams, cut_sizes
from leangrid.models.walk import BlockWalk
from leangrid.storage.source import open_source


def _block_outputs(name: str, ids: torch.Tensor, skeleton: Skeleton) -> list[torch.Tensor]:
    """What each block of the whole model, run plainly by transformers, gives out."""
    model, seen = tiny_models.build(name), []
    for index in range(len(skeleton.blocks)):
        block = model.get_submodule(skeleton.block_name(index))
        block.register_forward_hook(lambda _m, _i, out: seen.append(out[0] if isinstance(out, tuple) else out))
    model(ids)
    return seen


@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.parametrize("name", tiny_models.NAMES)
@torch.no_grad()
def test_original_stream_is_the_model(name: str, replay: bool, tmp_path: Path) -> None:
    skeleton = skeleton_of(name, tmp_path)
    ids = tiny_models.tokens(5, 32)  # two batches of 2 and one of 1: the arguments of both sizes are recorded
    flow, streams = enter(skeleton, ids.split(2))
    expected = _block_outputs(name, ids[:2], skeleton)
    for index in range(len(skeleton.blocks)):
        with skeleton.load_block(index) as block:
            walk = walk_through(skeleton, block, flow, index, streams, replay)
            for group in walk:
                for linear in group.names:
                    weight = block.get_parameter(f"{linear}.weight")
                    walk.replace(linear, weight + 0.05 * torch.randn_like(weight))
            streams = walk.finished()
        assert streams.original is not None
        torch.testing.assert_close(streams.original[0], expected[index], rtol=0, atol=1e-5)
        assert (streams.quantized[0] - streams.original[0]).abs().max() > 1e-3
    assert all(p.is_meta for block in skeleton.blocks for p in block.parameters()), "a block stayed in memory"


@torch.no_grad()
def test_groups_read_what_the_linears_read_and_each_product_is_computed_once(tmp_path: Path) -> None:
    skeleton = skeleton_of("llama2", tmp_path)
    ids = tiny_models.tokens(4, 16)
    flow, streams = enter(skeleton, ids.split(2), paired=False)
    with skeleton.load_block(0) as block:
        reads: dict[str, list[torch.Tensor]] = {}
        for linear in (n for group in skeleton.groups(0) for n in group):
            block.get_submodule(linear).register_forward_hook(
                lambda _m, args, _o, n=linear: reads.setdefault(n, []).append(args[0].clone())
            )
        seen = []
        walk = walk_through(skeleton, block, flow, 0, streams)
        for group in walk:
            assert not group.paired
            seen.append((group.names, [x.clone() for original, x in group if original is None]))
    assert tuple(names for names, _ in seen) == skeleton.groups(0)
    for names, inputs in seen:
        for linear in names:
            assert len(reads[linear]) == 2, "one call a batch"
            assert all(torch.equal(a, b) for a, b in zip(reads[linear], inputs, strict=True))


@torch.no_grad()
def _seen(name: str, directory: Path, replay: bool, paired: bool) -> list[torch.Tensor]:
    """Everything a walk gives: each group's inputs in both streams, and what leaves each block, with weights that
    change by group."""
    skeleton = Skeleton(open_source(directory))
    flow, streams = enter(skeleton, tiny_models.tokens(5, 32).split(2), paired)
    seen: list[torch.Tensor] = []
    generator = torch.Generator().manual_seed(0)
    for index in range(len(skeleton.blocks)):
        with skeleton.load_block(index) as block:
            walk = walk_through(skeleton, block, flow, index, streams, replay)
            for group in walk:
                seen += [x.clone() for pair in group for x in pair if x is not None]
                for linear in group.names:
                    weight = block.get_parameter(f"{linear}.weight")
                    walk.replace(linear, weight + 0.05 * torch.randn(weight.shape, generator=generator))
            streams = walk.finished()
        seen += [*streams.quantized, *(streams.original or [])]
    return seen


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_replaying_and_pausing_give_the_same_bits(name: str, paired: bool, tmp_path: Path) -> None:
    tiny_models.save(name, tmp_path)
    paused, replayed = (_seen(name, tmp_path, replay, paired) for replay in (False, True))
    assert (
        len(paused) == len(replayed) == 2 * 3 * 5 * (2 if paired else 1)
    )  # blocks, batches, four groups and the end, streams
    assert all(torch.equal(a, b) for a, b in zip(paused, replayed, strict=True))


@torch.no_grad()
def test_a_replayed_group_is_one_batch_at_a_time_and_can_be_read_again(tmp_path: Path) -> None:
    skeleton = skeleton_of("llama2", tmp_path)
    flow, streams = enter(skeleton, tiny_models.tokens(4, 16).split(1), paired=False)
    with skeleton.load_block(0) as block:
        gates: list[weakref.ref[torch.Tensor]] = []
        block.get_submodule("mlp.gate_proj").register_forward_hook(lambda _m, _a, out: gates.append(weakref.ref(out)))
        walk = walk_through(skeleton, block, flow, 0, streams, replay=True)
        for group in walk:
            first = [x.clone() for _, x in group]
            assert all(torch.equal(a, b) for a, (_, b) in zip(first, group, strict=True))
            assert not any(gate() is not None for gate in gates), "a pass outlived its batch"
    assert len(gates) == 2 * 4 + 4


def test_streams_are_cut_and_moved_where_they_are() -> None:
    hidden = [torch.randn(3, 4, 2), torch.randn(2, 4, 2)]
    streams = Streams(list(hidden), [-x for x in hidden])
    streams.rebatch(2)
    assert [len(x) for x in streams.quantized] == [2, 1, 2] and streams.original is not None
    assert torch.equal(torch.cat(streams.quantized), torch.cat(hidden)) and torch.equal(
        torch.cat(streams.original), -torch.cat(hidden)
    )
    streams.move(lambda x: x.double())
    assert all(x.dtype == torch.float64 for x in [*streams.quantized, *streams.original])
    fresh = Streams(list(hidden), list(hidden))  # before the first block both streams are the same
    fresh.rebatch(1)
    fresh.move(torch.clone)
    assert fresh.original is not None and all(a is b for a, b in zip(fresh.quantized, fresh.original, strict=True))
    edged = Streams(list(hidden), [-x for x in hidden])
    edged.rebatch(3, edge=4)  # three before it, then one and one
    assert [len(x) for x in edged.quantized] == [3, 1, 1]
    assert edged.original is not None
    assert torch.equal(torch.cat(edged.original), -torch.cat(hidden))
    alone = Streams(list(hidden), None)
    alone.rebatch(1)
    alone.move(torch.clone)
    assert len(alone.quantized) == 5 and alone.original is None


@pytest.mark.parametrize(("count", "windows", "edge", "sizes"), [
    (9, 4, 0, [4, 4, 1]),
    (9, 4, 4, [4, 4, 1]),
    (9, 4, 5, [4, 1, 4]),
    (9, 4, 9, [4, 4, 1]),
    (9, 4, -3, [4, 4, 1]),
    (9, 20, 2, [2, 7]),
    (1, 1, 0, [1]),
])  # fmt: skip
def test_batches_end_at_the_edge(count: int, windows: int, edge: int, sizes: list[int]) -> None:
    assert cut_sizes(count, windows, edge) == sizes


@torch.no_grad()
def test_quantized_stream_sees_the_new_weight_of_its_own_group(tmp_path: Path) -> None:
    """With every linear replaced by zero, only the residual is left; the original stream does not notice."""
    skeleton = skeleton_of("llama2", tmp_path)
    flow, streams = enter(skeleton, [tiny_models.tokens(2, 8)])
    with skeleton.load_block(0) as block:
        walk = walk_through(skeleton, block, flow, 0, streams)
        for group in walk:
            for linear in group.names:
                walk.replace(linear, torch.zeros_like(block.get_parameter(f"{linear}.weight")))
        out = walk.finished()
    assert torch.equal(out.quantized[0], streams.quantized[0])
    assert out.original is not None and not torch.equal(out.original[0], streams.quantized[0])


class _Bypass(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused, self.other = (torch.nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.other(x * 2) + self.used(x)


class _Alone(ChainedFlow):
    """A block of no model, called with its hidden states."""

    def __init__(self) -> None:
        pass

    def call(
        self,
        stream: str,
        batch: int,
        index: int,
        block: torch.nn.Module,
        hidden: torch.Tensor,
        trial: bool = False,
    ) -> torch.Tensor:
        return block(hidden)


def _walk(groups: tuple[tuple[str, ...], ...], replay: bool) -> None:
    hidden = torch.randn(1, 3, 4)
    with torch.no_grad():
        for group in BlockWalk(_Bypass(), FoundBlock("", groups), _Alone(), 0, Streams([hidden], None), replay):
            list(group)


@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.fault("N1")
def test_a_linear_that_is_never_called_is_an_error(replay: bool) -> None:
    with pytest.raises(CalibrationError, match="unused saw no tokens"):
        _walk((("other",), ("used",), ("unused",)), replay)


@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.fault("N1")
def test_groups_that_do_not_read_one_input_or_come_in_another_order_are_an_error(replay: bool) -> None:
    with pytest.raises(ArchitectureError, match="does not read the same input"):
        _walk((("other", "used"),), replay)
    with pytest.raises(CalibrationError, match="saw no tokens"):
        _walk((("used",), ("other",)), replay)


def test_streams_survive_the_state_file() -> None:
    streams = Streams(
        [torch.full((1, 2), float(i)) for i in range(12)], [torch.full((1, 2), -float(i)) for i in range(12)]
    )
    again = Streams.from_tensors(streams.tensors())
    assert all(torch.equal(a, b) for a, b in zip(streams.quantized, again.quantized, strict=True))
    assert again.original is not None and torch.equal(again.original[11], streams.original[11])  # pyright: ignore[reportOptionalSubscript]
    assert Streams.from_tensors(Streams(streams.quantized, None).tensors()).original is None

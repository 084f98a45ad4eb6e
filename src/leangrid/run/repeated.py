"""The walk through a block that the model calls more than once in one pass (Albert, HRM).

It has one set of weights for all its calls, so the Hessian of each group is the sum over all of them. What later calls
read depends on the block itself: for each group the whole model runs once more from its first block on, a block in
memory at a time, with the weights that are known by then. That is a forward pass a group, beside the run's own."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from leangrid.models.flow import Flow, Get, LiveFlow, Put
from leangrid.models.skeleton import Skeleton
from leangrid.models.streams import Streams
from leangrid.models.walk import BlockWalk, ExpertInputs, GroupInputs

WeightsOf = Callable[[int, nn.Module], Mapping[str, Tensor]]


class RepeatedWalk:
    """As BlockWalk, for a block that is called more than once.

    Args:
        skeleton, index: the model, and the block's number.
        module: the block, with its original weights in memory.
        flow: that of the run, which stands at the block's first call.
        streams: what enters it there.
        batches: token ids, int64 [windows, length] each.
        weights_of: the new weights of the linears of a committed block, as its modules store them.
        places: puts hidden states where they wait, and gets them back.
        held_out: how many batches, the last ones, are in no group's inputs.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        index: int,
        module: nn.Module,
        flow: Flow,
        streams: Streams,
        batches: Sequence[Tensor],
        weights_of: WeightsOf,
        places: tuple[Put, Get],
        held_out: int = 0,
    ) -> None:
        self._skeleton, self._index, self._module, self._flow = skeleton, index, module, flow
        self._streams, self._weights_of, self._places = streams, weights_of, places
        self._batches = batches[: len(batches) - held_out]
        self._device = next(module.parameters()).device
        self._originals: dict[str, Tensor] = {}
        self._new: dict[str, Tensor] = {}
        self.flops = 0.0

    def replace(self, name: str, weight: Tensor) -> None:
        """Let the quantized stream go on with ``weight`` [rows, cols as the module stores it] in the linear
        ``name``."""
        self._originals[name] = self._module.get_parameter(f"{name}.weight").data
        self._new[name] = weight

    def __iter__(self) -> Iterator[GroupInputs | ExpertInputs]:
        found, paired = self._skeleton.structure.blocks[self._index], self._streams.original is not None
        walk = BlockWalk(self._module, found, self._flow, self._index, self._streams)
        for group in range(len(found.groups)):
            yield walk.inputs(group, paired, lambda group=group: self._read(group))

    def finished(self) -> Streams:
        """The streams that leave the first call, each with its own weights."""
        original = None
        if self._streams.original is not None:
            original = self._call("original", self._streams.original)
        self._set(self._new)
        return Streams(self._call("quantized", self._streams.quantized), original)

    def _call(self, stream: str, states: list[Tensor]) -> list[Tensor]:
        calls = enumerate(states)
        return [self._flow.call(stream, batch, self._index, self._module, hidden) for batch, hidden in calls]

    def _read(self, group: int) -> Iterator[tuple[int, Any, Any]]:
        """What ``group`` reads in all calls of the block, call after call, with the number of the batch."""
        names = ("quantized",) if self._streams.original is None else ("quantized", "original")
        put, get = self._places
        again = LiveFlow(self._skeleton, self._device, get, beside=True)
        try:
            entered = again.enter(self._batches, put, *names)
            streams = Streams(list(entered), list(entered) if len(names) > 1 else None)
            at = self._skeleton.structure.order
            last = len(at) - 1 - at[::-1].index(self._index)
            for index in at[: last + 1]:
                if index == self._index:
                    found = self._skeleton.structure.blocks[index]
                    walk = BlockWalk(self._module, found, again, index, streams)
                    yield from walk.gather(group, self._originals, self._new)
                    self.flops += walk.flops
                else:
                    self._through(again, index, streams)
                streams = again.advance_both(streams)[1]
        finally:
            again.close()

    def _through(self, flow: LiveFlow, index: int, streams: Streams) -> None:
        """Through another block: with its new weights where it is committed, as it is where its turn is later."""
        with self._skeleton.load_block(index, self._device) as block:
            for batch, hidden in enumerate(streams.original or []):
                flow.call("original", batch, index, block, hidden)
            for name, weight in (self._weights_of(index, block) if index < self._index else {}).items():
                block.get_parameter(f"{name}.weight").data = weight
            for batch, hidden in enumerate(streams.quantized):
                flow.call("quantized", batch, index, block, hidden)

    def _set(self, weights: Mapping[str, Tensor]) -> None:
        for name, weight in weights.items():
            self._module.get_parameter(f"{name}.weight").data = weight


def is_repeated(skeleton: Skeleton, index: int) -> bool:
    """Whether the model calls block ``index`` more than once in one pass."""
    return skeleton.structure.order.count(index) > 1

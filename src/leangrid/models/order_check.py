"""Whether a model calls its blocks for these texts as it did when it was looked at, while each block is run alone.

Which blocks are called may depend on the numbers in the hidden states, which nobody knows before they are computed. So
one pass through the model's own forward for each of the first batches and each stream stands beside the blocks that are
called alone (ChainedFlow in flow.py): it is handed what a block made, and must call the next block with just that. A
few batches are enough, since each pass holds masks and rotary tables of its own. Nothing is computed twice, and the
states are those of the streams. The weights outside of the blocks are not in memory meanwhile: what is computed with
them between two blocks is not looked at."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from greenlet import GreenletExit
from torch import Tensor

from leangrid.errors import ArchitectureError
from leangrid.models.calls import fill, place_of
from leangrid.models.model_inputs import Inputs
from leangrid.models.model_pass import (
    END,
    FOLLOWS_TEXT,
    Get,
    ModelPass,
    Put,
    expected_call,
    require_order,
    run_of,
    stop_in,
)
from leangrid.models.shape_pass import ShapePass
from leangrid.models.skeleton import Skeleton

LOOKED_AT = 4  # batches


class _Beside(ModelPass):
    """One batch's pass.

    Attributes:
        waiting: the states with which it was stopped, as the model's own code has them.
        stored: the stream's, of which they are.
    """

    waiting: Tensor
    stored: Tensor


class OrderCheck:
    """The model's own passes beside blocks that are run alone.

    Args:
        skeleton: the model, in which hidden states are all that flows from block to block.
        device: where the model's own code finds the states.
        get: gives states that wait elsewhere on the device.
        looked_at: how many batches, the first ones, have passes beside them.
    """

    def __init__(self, skeleton: Skeleton, device: torch.device, get: Get, looked_at: int) -> None:
        self._skeleton, self._device, self._get, self._looked_at = skeleton, device, get, looked_at
        self._passes: dict[str, list[_Beside]] = {}
        self._sizes: list[int] = []  # windows of every batch that entered the model
        self._modules = [*skeleton.blocks, *(skeleton.model.get_submodule(path) for path in skeleton.structure.idle)]

    def begin(self, batches: Sequence[Inputs], put: Put, streams: Iterable[str]) -> list[Tensor]:
        """Let a pass for each batch and stream run to its first block, while the weights outside of the blocks are
        loaded; the states that enter it, where ``put`` puts them, which the streams share. The passes of the first
        batches stay."""
        self.close()
        for index, module in enumerate(self._modules):  # those that were not called come last
            stop_in(module, index)
        entered: list[Tensor] = []
        for number, stream in enumerate(streams):
            self._passes[stream] = []
            for batch, inputs in enumerate(batches[: self._looked_at] if number else batches):
                one = _Beside(run_of(self._skeleton, inputs, self._device))
                states = one.reach_block(None)
                require_order(self._skeleton, one, 0)
                if not number:
                    entered.append(put(states.detach()))
                if batch < self._looked_at:
                    self._passes[stream].append(one)
                    _wait(one, states, entered[batch])
                else:
                    one.throw(GreenletExit)
        self._sizes = [len(states) for states in entered]
        return entered

    def resume(self, batches: Sequence[Inputs], index: int, streams: Mapping[str, list[Tensor]]) -> None:
        """As ``begin``, for ``streams`` that stand before block ``index``: the blocks before it return those states."""
        self.begin(batches[: self._looked_at], _without_memory, streams)
        for stream, states in streams.items():
            self._sizes = [len(hidden) for hidden in states]
            for one, hidden in zip(self._passes[stream], states, strict=False):
                for _ in range(index):
                    self._go_on(one, hidden)
                _wait(one, one.waiting, hidden)

    def stands_at(self, index: int, streams: Mapping[str, list[Tensor]]) -> bool:
        """Whether passes of these streams and batches stand before block ``index``."""
        same = all([len(hidden) for hidden in states] == self._sizes for states in streams.values())
        stand = all(one.index == index for passes in self._passes.values() for one in passes)
        return same and stand and self._passes.keys() == streams.keys()

    def go_on(self, stream: str, left: Sequence[Tensor]) -> None:
        """Hand the passes of ``stream`` what their block made, batch by batch; ArchitectureError where the model's own
        code does not go on to the next block with it."""
        for one, hidden in zip(self._passes[stream], left, strict=False):
            self._go_on(one, hidden)

    def close(self) -> None:
        """End the passes."""
        for one in (one for passes in self._passes.values() for one in passes):
            if not one.dead:
                one.throw(GreenletExit)
        self._passes.clear()
        for module in self._modules:
            module.__dict__.pop("forward", None)

    def _go_on(self, one: _Beside, left: Tensor) -> None:
        skeleton, before = self._skeleton, one.calls
        waiting, given = one.waiting, self._here(left)
        waiting.data = self._here(one.stored)
        last = expected_call(skeleton, before) == END
        with _UpToWeights() if last else ShapePass():
            entered = one.reach_block(fill(skeleton.structure.blocks[one.index].returns, given))
        waiting.data = _without_memory(waiting)  # the model's own code may hold it to its end
        require_order(skeleton, one, before)
        if not last:
            if place_of(entered) != place_of(given):
                what = "what enters it is not what the block before it returned, as it was when the model was looked at"
                raise ArchitectureError(what, skeleton.block_name(one.index), FOLLOWS_TEXT)
            _wait(one, entered, left)

    def _here(self, states: Tensor) -> Tensor:
        """A tensor of its own that shows ``states`` on the device."""
        return states.detach() if states.device.type == self._device.type else self._get(states, self._device)


class _UpToWeights(ShapePass):
    """Ends a pass where it would compute with a weight that is not there: behind the last block that says that no other
    block is called."""

    def note(self, func: Any, given: list[Tensor], args: Any, kwargs: dict[str, Any]) -> None:
        if any(x.is_meta for x in given):
            raise GreenletExit


def _wait(one: _Beside, states: Tensor, away: Tensor) -> None:
    """Let the ``states`` that a pass was stopped with be those of the stream, in no memory of their own."""
    states.data = away.reshape(states.shape)
    one.waiting, one.stored = states, away


def _without_memory(states: Tensor) -> Tensor:
    return states.new_zeros(()).expand(states.shape)

"""A look into a run of leangrid: where its streams end, and what its linears read when their weights are left alone.

Neither is in any file of a result. The run is the real one; what passes through it is noted on the way."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from leangrid.models.flow import ChainedFlow, LiveFlow
from leangrid.models.walk import GroupInputs
from leangrid.run.block import Block
from leangrid.run.committed import CommittedWeights
from leangrid.run.run import Run


@dataclass
class Watched:
    """What was seen of a run.

    Attributes:
        ends: ``walked`` and, with two streams, ``original``: the hidden states of all windows that leave the last block
            that is called.
        block: the path of that block.
        hessians: path of a linear -> the sum of x x^T over everything it read, float64 [cols, cols].
    """

    ends: dict[str, Tensor] = field(default_factory=dict)
    block: str = ""
    hessians: dict[str, Tensor] = field(default_factory=dict)


@contextmanager
def ends_watched() -> Iterator[Watched]:
    """Context: note where the streams of a run end: what the last call of a block returned, batch by batch."""
    seen, batches, own_publish = Watched(), dict[str, dict[int, Tensor]](), Run.publish

    def watched(own: Any) -> Any:
        def call(self: Any, stream: str, batch: int, index: int, *given: Any, **options: Any) -> Tensor:
            left = own(self, stream, batch, index, *given, **options)
            if not seen.ends:
                seen.block = self._skeleton.block_name(index)
                batches.setdefault(stream, {})[batch] = left.cpu()
            return left

        return call

    def publish(self: Any) -> Any:  # the gate goes through the blocks again, with other texts
        for stream in batches.keys() & named.keys():
            found = batches[stream]
            seen.ends[named[stream]] = torch.cat([found[batch] for batch in sorted(found)])
        return own_publish(self)

    named = {"quantized": "walked", "original": "original"}
    with (
        patch.object(ChainedFlow, "call", watched(ChainedFlow.call)),
        patch.object(LiveFlow, "call", watched(LiveFlow.call)),
        patch.object(Run, "publish", publish),
    ):
        yield seen


@contextmanager
def hessians_watched() -> Iterator[Watched]:
    """Context: leave the weights alone while a run walks, and sum what each linear reads. The run ends, by ``Walked``,
    where it would publish its result."""
    seen, groups, queue = Watched(), Block.groups, Block.queue_weight

    def watched(self: Any, timer: Any) -> Iterator[Any]:
        for number, group in groups(self, timer):
            _add(seen.hessians, self.name, group)
            yield number, group

    def queue_original(self: Any, name: str, weight: Tensor) -> None:
        queue(self, name, self.weight(name))

    def publish(self: Any) -> None:
        raise Walked

    with (
        patch.object(Block, "groups", watched),
        patch.object(Block, "queue_weight", queue_original),
        patch.object(CommittedWeights, "of", lambda self, index, block: {}),
        patch.object(Run, "publish", publish),
    ):
        yield seen


class Walked(Exception):
    """The run has walked through all blocks."""


def _add(hessians: dict[str, Tensor], block: str, group: Any) -> None:
    """Add what the linears of ``group`` read, the quantized stream's, to their sums."""
    if isinstance(group, GroupInputs):
        read = [(group.names, (ours for _, ours in group))]  # one after another: the model may change what was read
    else:
        batches = list(group)
        read = [(names, [batch[e] for batch in batches]) for e, names in enumerate(group.experts)]
    for names, inputs in read:
        total = sum(x.reshape(-1, x.shape[-1]).double().T @ x.reshape(-1, x.shape[-1]).double() for x in inputs)
        for name in names:
            path = f"{block}.{name}"
            hessians[path] = hessians[path] + total if path in hessians else torch.as_tensor(total)

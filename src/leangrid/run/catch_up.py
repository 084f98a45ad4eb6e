"""How the streams go on from a block that is committed, where the model's own forward pass is held at its blocks.

Where hidden states are all that flows, they are what the block gave, and they are saved. In other models (flow.py) each
pass goes on from block to block: to the next one; through one that is called again, which has its new weights by then;
and, in a run that is resumed, through all that are committed, with the weights that are read from the files. These are
the same weights and the same products as before the run was stopped, so its bytes are the same."""

import torch

from leangrid.models.flow import Flow
from leangrid.models.skeleton import Skeleton
from leangrid.models.streams import Streams
from leangrid.run.block import StageTimer
from leangrid.run.committed import CommittedWeights


class Onward:
    """Takes both streams from one block to another.

    Args:
        skeleton, flow: the model, and the way through it.
        weights: of committed blocks.
        device: where blocks are computed.
        timer: counts the time as a stage of the run.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        flow: Flow,
        weights: CommittedWeights,
        device: torch.device | str,
        timer: StageTimer,
    ) -> None:
        self._skeleton, self._flow, self._weights = skeleton, flow, weights
        self._device, self._timer = device, timer

    def advance(self, index: int, streams: Streams) -> Streams:
        """The streams that enter the next block that is not committed; ``streams`` left block ``index``, which is."""
        if self._flow.waits:
            return self._step(streams)[0]
        return self._to_next(index, *self._step(streams))

    def catch_up(self, committed: int, streams: Streams) -> Streams:
        """The streams that enter block number ``committed``; ``streams`` enter the first."""
        for index in range(committed):
            streams = self._to_next(index, *self._through(index, streams))
        return streams

    def _to_next(self, index: int, streams: Streams, following: int | None) -> Streams:
        """Through blocks up to ``index`` that are called again, whose weights are known, to the next one."""
        while following is not None and following <= index:
            streams, following = self._through(following, streams)
        return streams

    def _through(self, index: int, streams: Streams) -> tuple[Streams, int | None]:
        """Both streams through the committed block ``index``, each with its own weights, and on to the next."""
        with self._timer("calibrate"), self._skeleton.load_block(index, self._device) as block:
            for batch, hidden in enumerate(streams.original or []):
                self._flow.call("original", batch, index, block, hidden)
            for name, weight in self._weights.of(index, block).items():
                block.get_parameter(f"{name}.weight").data = weight
            for batch, hidden in enumerate(streams.quantized):
                self._flow.call("quantized", batch, index, block, hidden)
        return self._step(streams)

    def _step(self, streams: Streams) -> tuple[Streams, int | None]:
        """Hand every pass what its block returned; the states that enter the next one, and its number."""
        with self._timer("calibrate"):
            following, streams = self._flow.advance_both(streams)
        return streams, following

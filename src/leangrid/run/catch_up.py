"""How the streams go on from a block that is committed, and how a run that is resumed gets to where it was.

Where hidden states are all that flows, they are what the block gave, and are saved now and then
(storage/state_schedule.py). In other models (flow.py) each pass goes on from block to block: to the next one, and
through one that is called again, which has its new weights by then. A run that is resumed goes through all blocks that
were committed after its states were saved, with the weights that are read from the files. These are the same weights
and the same products as before the run was stopped, so its bytes are the same."""

from torch import Tensor, nn

from leangrid.models.flow import Flow
from leangrid.models.skeleton import Skeleton
from leangrid.models.streams import Streams
from leangrid.run.block import StageTimer
from leangrid.run.committed import CommittedWeights
from leangrid.run.states import StatePlaces


class Onward:
    """Takes both streams from one block to another.

    Args:
        skeleton, flow: the model, and the way through it.
        weights: of committed blocks.
        states: where hidden states wait, and blocks are computed.
        timer: counts the time as a stage of the run.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        flow: Flow,
        weights: CommittedWeights,
        states: StatePlaces,
        timer: StageTimer,
    ) -> None:
        self._skeleton, self._flow, self._weights = skeleton, flow, weights
        self._states, self._timer = states, timer

    def advance(self, index: int, streams: Streams) -> Streams:
        """The streams that enter the next block that is not committed; ``streams`` left block ``index``, which is."""
        if self._flow.waits:
            return self._step(streams)[0]
        return self._to_next(index, *self._step(streams))

    def catch_up(self, committed: int, streams: Streams, first: int = 0) -> Streams:
        """The streams that enter block number ``committed``; ``streams`` enter block number ``first``."""
        for index in range(first, committed):
            streams = self._to_next(index, *self._through(index, streams))
        return streams

    def _to_next(self, index: int, streams: Streams, following: int | None) -> Streams:
        """Through blocks up to ``index`` that are called again, whose weights are known, to the next one."""
        while following is not None and following <= index:
            streams, following = self._through(following, streams)
        return streams

    def _through(self, index: int, streams: Streams) -> tuple[Streams, int | None]:
        """Both streams through the committed block ``index``, each with its own weights, and on to the next."""
        device = self._states.block_device
        with self._timer("calibrate"), self._skeleton.load_block(index, device) as block:
            original = streams.original
            if original is not None:
                original = [self._call("original", batch, index, block, x) for batch, x in enumerate(original)]
            for name, weight in self._weights.of(index, block).items():
                block.get_parameter(f"{name}.weight").data = weight
            quantized = [self._call("quantized", batch, index, block, x) for batch, x in enumerate(streams.quantized)]
        return self._step(Streams(quantized, original))

    def _call(self, stream: str, batch: int, index: int, block: nn.Module, hidden: Tensor) -> Tensor:
        """What leaves ``block``, where it waits."""
        if not self._flow.waits:  # the flow gets and puts its states itself
            return self._flow.call(stream, batch, index, block, hidden)
        entered = self._states.get(hidden, self._states.block_device)
        return self._states.put(self._flow.call(stream, batch, index, block, entered))

    def _step(self, streams: Streams) -> tuple[Streams, int | None]:
        """Hand every pass what its block returned; the states that enter the next one, and its number."""
        with self._timer("calibrate"):
            following, streams = self._flow.advance_both(streams)
        return streams, following

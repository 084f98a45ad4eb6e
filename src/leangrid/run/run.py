"""A run while it is open: the model, what is committed already, the hidden states, and how a block enters and leaves.

``open_run`` makes it; quantize.py asks it for one block after another.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

from torch import Tensor, nn

from leangrid.data.windows import PictureRows, Windows
from leangrid.errors import Interrupted
from leangrid.formats import FORMATS
from leangrid.machine import memory
from leangrid.machine.arithmetic import use_products
from leangrid.machine.devices import DeviceClock, has_own_memory, is_out_of_memory
from leangrid.models.flow import ChainedFlow, LiveFlow, open_flow
from leangrid.models.prefetch import Prefetch
from leangrid.models.streams import Streams, cut_sizes
from leangrid.models.walk import BlockWalk
from leangrid.run.accounting import Accounting
from leangrid.run.block import Block
from leangrid.run.block_writer import BlockWriter
from leangrid.run.catch_up import Onward
from leangrid.run.committed import CommittedWeights
from leangrid.run.guide import Guide
from leangrid.run.inputs import RunInputs
from leangrid.run.less_memory import reduce_placement
from leangrid.run.publish import publish
from leangrid.run.ranks import Ranks, checksum
from leangrid.run.repeated import RepeatedWalk, is_repeated
from leangrid.run.result import QuantizeResult
from leangrid.run.run_progress import RunProgress
from leangrid.run.states import StatePlaces
from leangrid.solve.correction import LARGEST
from leangrid.solve.rescue import Rescue
from leangrid.solve.tuning import count_held_out
from leangrid.storage.mapped import MappedTensors

_AGAIN = "the states before it are computed once more"
_ONE_WINDOW = f"one calibration window: how much of the correction it bears cannot be measured, {LARGEST} is taken"
_FAST_PRODUCTS = ("calibrate", "hessian")  # stages in the recipe's arithmetic; everything that is solved is in float32


class Run:
    """An open run; it holds the journal's lock until ``open_run`` closes it.

    Attributes:
        inputs: what was asked for, and what it was asked of.
        skeleton, recipe, journal: those of ``inputs``.
        windows: the calibration tokens of all ranks, int64 [samples, length], or rows with pictures.
        device: where blocks are computed, in torch's words.
        strength: a, the share of the inputs' own error that is corrected; None: measured, for each linear.
        held_out: how many of this rank's batches, the last ones, neither Hessians nor tuning see; 0 without tuning.
        precision: what the container keeps scales and levels in.
        states: where hidden states wait, by the present placement.
        writer: takes what was solved.
        weights: the new weights of committed blocks.
        flow, onward: how the streams get to the next block.
        guide: what blocks are tuned by beside their own outputs; None: nothing.
        clock, accounting, progress: seconds, operations, and what watchers are told.
    """

    def __init__(self, inputs: RunInputs, windows: Windows, clock: DeviceClock, ranks: Ranks) -> None:
        self.inputs, self.windows, self.clock, self.ranks = inputs, windows, clock, ranks
        self.skeleton, self.recipe, self.journal = inputs.skeleton, inputs.recipe, inputs.journal
        if isinstance(windows, PictureRows):  # a pass holds more than hidden states, and the tower is needed
            self.skeleton.see_pictures()
            self.journal.keeps_states = False
        self.device, done = inputs.request.device, inputs.journal.find_resume_point()
        self.strength, self._edge = self._choose_strength()
        # By the smallest share, so that all ranks hold out as many, or none.
        together = inputs.placement.windows if isinstance(windows, Tensor) else 1
        batches = len(windows) // ranks.count // together
        self.held_out = count_held_out(batches) if self.recipe.holds_out else 0
        self.precision = FORMATS[self.recipe.format].precision(self.skeleton.dtype)
        self.states = StatePlaces(inputs.placement, self.device, MappedTensors(self.journal.states))
        self.accounting = Accounting(clock, self.skeleton, self.recipe, windows.numel())
        watcher, blocks = inputs.request.progress if ranks.first else None, len(self.skeleton.blocks)
        self.progress = RunProgress(watcher, clock, blocks, done, windows.numel())
        self.writer = BlockWriter(inputs, self.states, clock, self.accounting, self.progress, ranks)
        self.flow = open_flow(self.skeleton, self.device, self.states.get)
        self.weights = CommittedWeights(self.skeleton, self.recipe, self.journal)
        self.guide: Guide | None = None
        self.onward = Onward(self.skeleton, self.flow, self.weights, self.states, self.stage)
        if self.recipe.measures_correction and self.strength is not None:
            self.progress.report("notice", done, message=_ONE_WINDOW)
        self._first_batches = 0  # batches of this rank in the first half
        self._entered = 0  # windows of a batch in the passes that are held
        self._begin_again = False  # since a block that was not finished may have changed what the passes hold
        self._stage = ("calibrate", 0)  # the last that began, and its group
        self._prefetch: Prefetch | None = None
        if has_own_memory(self.device):
            self._prefetch = Prefetch(self.skeleton, self.device, to_device=not inputs.placement.in_place)

    def is_in_first_half(self, batch: int) -> bool:
        """Whether batch number ``batch`` of this rank is in the first half of the calibration windows of all ranks, by
        which the correction's noise is measured."""
        return batch < self._first_batches

    def close(self) -> None:
        """End the thread that reads weights ahead."""
        self.flow.close()
        if self._prefetch is not None:
            self._prefetch.close()

    @contextmanager
    def stage(self, name: str, group: int = 0) -> Iterator[None]:
        """Count the body's time as stage ``name`` of group ``group``, and compute in that stage's arithmetic."""
        self._stage = (name, group)
        with self.clock.stage(name), use_products(self.recipe.products if name in _FAST_PRODUCTS else "float32"):
            yield

    def remaining_blocks(self) -> range:
        """Indices of the blocks that are not committed yet, in order."""
        return range(self.journal.count_committed(), len(self.skeleton.blocks))

    def streams(self) -> Streams:
        """The hidden states that enter the first block that is not committed yet, or leave the last where all are; none
        of a model that is finished, too.

        A run that was stopped after its last block computes what leaves it, since the model may go on to another block
        then, which is an error."""
        done = self.journal.count_committed()
        if done == len(self.skeleton.blocks) and self.journal.read_finished_info() is not None:
            self.progress.report("notice", done, message="resuming after the last block")
            return Streams([], None)
        kept = self.ranks.broadcast(self.journal.find_state() if self.ranks.first else None) if self.flow.waits else 0
        streams = self._saved_streams(kept) if kept else self._enter()
        if done:
            where = f"resuming after block {done} of {len(self.skeleton.blocks)}"
            again = "" if kept == done else f": {_AGAIN}, from block {kept + 1} on"
            self.progress.report("notice", done, message=where + again)
        if kept < done:
            self._prepare(streams, kept)
            streams = self.onward.catch_up(done, streams, kept)
        return streams

    def _saved_streams(self, index: int) -> Streams:
        """The states that enter block ``index``, as the journal has them; of several ranks, this one's part."""
        dtype, found = self.skeleton.compute_dtype, None
        if self.ranks.first:
            found = self.journal.load_state(index, lambda hidden: self.states.put(hidden.to(dtype)))
        tensors = self.ranks.broadcast(found)
        if tensors is None:
            what = "the hidden states of the unfinished run were lost"
            raise Interrupted(what, self.journal.partial, "Run the same command again")
        streams = Streams.from_tensors(tensors)
        self.ranks.cut_to_share(streams)
        return streams

    def attempt_block(
        self, quantize: Callable[["Run", int, Streams], Streams], index: int, streams: Streams
    ) -> Streams:
        """``quantize`` block ``index``; where memory runs out, begin the block again with the next smaller placement.

        Raises:
            Interrupted: there is no smaller one.
        """
        while True:
            try:
                self._rebatch(streams)
                left = quantize(self, index, streams)
                if self.guide is not None:
                    self.guide.drop(index)
                return left
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            self._reduce(index)  # after the except: an error holds on to every tensor of the attempt

    @contextmanager
    def open_block(self, index: int, streams: Streams) -> Iterator[Block]:
        """Block ``index`` with its weights in memory and the streams before it."""
        placement = self.states.placement
        name = self.skeleton.block_name(index)
        with self.stage("load"):
            weights = None if self._prefetch is None else self._prefetch.weights_of(index)
            context = self.skeleton.load_block(index, "cpu" if placement.host_block else self.device, weights)
            del weights
            module = context.__enter__()
            if self.ranks.count > 1:  # a look at 16 places of each file has shown them to be alike; this is all of it
                self.ranks.require_agreement(**{f"the weights of {name}": checksum(module)})
        self._prefetch_block(index + 1)
        try:
            yield Block(index, name, module, self._walk(index, module, streams), self.skeleton)
        finally:
            context.__exit__(None, None, None)

    def _walk(self, index: int, module: nn.Module, streams: Streams) -> BlockWalk | RepeatedWalk:
        """The walk through block ``index``."""
        if is_repeated(self.skeleton, index):
            known, places = self.weights.of, (self.states.put, self.states.get)
            ways = (self._batches(), known, places, self.held_out)
            return RepeatedWalk(self.skeleton, index, module, self.flow, streams, *ways)
        placement, states = self.states.placement, self.states
        found = self.skeleton.structure.blocks[index]
        ways = (placement.replay, placement.in_place)
        return BlockWalk(module, found, self.flow, index, streams, *ways, states.get, states.put, self.held_out)

    def publish(self) -> QuantizeResult:
        """Publish the result, on rank 0, and say on all ranks what the run did."""
        result = None
        if self.ranks.first:
            self.progress.report("save", len(self.skeleton.blocks) - 1)
            memory.return_freed_memory()  # what the blocks left: writing the result needs pieces of other sizes
            result = publish(self.inputs, self.windows, self.clock, self.whole_device)
            for warning in result.quality.get("warnings", []):
                self.progress.report("notice", len(self.skeleton.blocks), message=f"warning: {warning}")
        return self.ranks.broadcast(result)

    @property
    def whole_device(self) -> str:
        """Where the model is run as a whole, in torch's words."""
        return "cpu" if self.states.placement.host_block else self.device

    @property
    def own_windows(self) -> int:
        """How many windows this rank has."""
        return len(self.ranks.share(self.windows))

    def own_batches(self) -> tuple[list[Any], int]:
        """This rank's windows in batches as they are tuned by, and the number of its first window among those of all
        ranks."""
        before = self.windows.tensor_split(self.ranks.count)[: self.ranks.rank]
        return self._batches_of(self.ranks.rank), sum(map(len, before))

    def batches_of_all_ranks(self) -> tuple[list[Any], list[Any]]:
        """The calibration windows in batches as they are tuned by: those of every rank that Hessians saw, and those
        that were held out."""
        seen: list[Any] = []
        held: list[Any] = []
        for rank in range(self.ranks.count):
            batches = self._batches_of(rank)
            cut = len(batches) - self.held_out
            seen, held = seen + batches[:cut], held + batches[cut:]
        return seen, held

    def _batches_of(self, rank: int) -> list[Any]:
        part = self.windows.tensor_split(self.ranks.count)[rank]
        return list(part.split(cut_sizes(len(part), self.states.placement.windows, self._edge_of(rank))))

    def _rebatch(self, streams: Streams) -> None:
        """Cut and move the streams, where they are, to what the placement asks for."""
        sizes = None
        if self._prepare(streams, self.journal.count_committed()):
            sizes = [len(batch) for batch in streams.quantized]
        elif self._begin_again or self._entered > self.states.placement.windows:
            done, self._begin_again = self.journal.count_committed(), False
            again = self.onward.catch_up(done, self._enter())  # new passes, perhaps of fewer windows
            streams.quantized[:], streams.original = again.quantized, again.original
        elif isinstance(self.flow, LiveFlow):
            self.flow.put_away()
        if sizes is None:
            sizes = [len(batch) if isinstance(batch, Tensor) else 1 for batch in self._batches()]
        self._first_batches = sum(start < self._edge for start in accumulate(sizes, initial=0))

    def _prepare(self, streams: Streams, index: int) -> bool:
        """Cut and move streams before block ``index``, and be ready for them, where hidden states are all that flows;
        whether that is so."""
        if not (isinstance(self.flow, ChainedFlow) and isinstance(self.windows, Tensor)):
            return False
        streams.rebatch(self.states.placement.windows, self._edge)
        streams.move(self.states.put)
        with self.stage("calibrate"):
            self.flow.prepare(self.ranks.share(self.windows), streams, index)
        return True

    def _enter(self) -> Streams:
        """Run everything before the first block."""
        self._entered = self.states.placement.windows
        batches = self._batches()
        paired = self.recipe.streams == 2
        streams = ("quantized", "original") if paired else ("quantized",)
        with self.stage("calibrate"):
            hidden = self.flow.enter(batches, self.states.put, *streams)
        return Streams(hidden, list(hidden) if paired else None)

    def _batches(self) -> Sequence[Any]:
        """This rank's windows, cut into batches none of which is in both halves."""
        mine = self.ranks.share(self.windows)
        return mine.split(cut_sizes(len(mine), self._entered, self._edge))

    def _choose_strength(self) -> tuple[float | None, int]:
        """``strength``, and how many of this rank's windows are in the first half: none where nothing is measured."""
        if not isinstance(self.recipe.correct, str):
            return self.recipe.correct or 0.0, 0
        return (None, self._edge_of(self.ranks.rank)) if len(self.windows) > 1 else (LARGEST, 0)

    def _edge_of(self, rank: int) -> int:
        """How many of the windows of ``rank`` are in the first half of all; 0 where no share is measured."""
        parts = [len(part) for part in self.windows.tensor_split(self.ranks.count)]
        measured = self.recipe.measures_correction
        return min(max(len(self.windows) // 2 - sum(parts[:rank]), 0), parts[rank]) * measured

    def _reduce(self, index: int) -> None:
        """Use less memory from block ``index`` on, said and recorded."""
        name = self.skeleton.block_name(index)
        if self.ranks.count > 1:
            what = f"out of memory, and {self.ranks.count} ranks cannot do with less"
            raise Interrupted(what, name, "Finished blocks are kept: free memory, or go on with one process")
        smaller, words = reduce_placement(
            self.states.placement, self._stage, self.skeleton, self.recipe, self.windows, index, self.device
        )
        if self.guide is not None and not self.flow.waits and smaller.windows != self.states.placement.windows:
            what = "out of memory, and what guides tuning is drawn for batches of this size"
            raise Interrupted(what, name, "Finished blocks are kept: free memory, or go on with more of it")
        self.states.placement = smaller
        self._begin_again = self.skeleton.structure.blocks[index].changes
        self.writer.reductions.append(Rescue("memory", f"out of memory: {words}"))
        if self._prefetch is not None:
            self._prefetch.to_device = not smaller.in_place and not smaller.host_block
        self.progress.report("notice", index, message=f"out of memory in {name}: {words}, from here on")

    def _prefetch_block(self, index: int) -> None:
        """Begin to read block ``index``, where there is one."""
        if self._prefetch is not None:
            self._prefetch.begin(index)
        elif index < len(self.skeleton.blocks):
            self.inputs.checkpoint.prefetch(self.skeleton.block_sources(index))

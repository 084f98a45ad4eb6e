"""One run on disk: what it works on, what is already committed, and how it ends. The hallway asks, this room
answers."""

import gc
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from leangrid import kernels
from leangrid.errors import Interrupted, LeangridError
from leangrid.formats import FORMATS
from leangrid.grids import Grid
from leangrid.machine import flops, memory
from leangrid.machine.arithmetic import products
from leangrid.machine.devices import (
    DeviceClock,
    accelerated,
    checked,
    peak_bytes,
    release_cached,
    start_counting,
    to_host,
)
from leangrid.machine.stopwatch import Clock
from leangrid.models.prefetch import Ahead
from leangrid.models.skeleton import Skeleton
from leangrid.models.walk import Calls, Streams, embed
from leangrid.planning.footprint import Demand, choose, footprint
from leangrid.planning.placement import Failed, Placement
from leangrid.planning.sizes import stored_schemes
from leangrid.progress import Event, Progress
from leangrid.recipe import Recipe
from leangrid.report.records import LayerRecord
from leangrid.report.sample import sample_of, sampled_layer
from leangrid.run.follower import prepare_all
from leangrid.run.open_run import Prepared, calibration_windows, check_values
from leangrid.run.publish import publish
from leangrid.run.ranks import Ranks, checksum
from leangrid.run.result import QuantizeResult
from leangrid.solve.factor import Factor
from leangrid.solve.hessian import Hessian
from leangrid.solve.layer import LinearResult
from leangrid.solve.rescue import Rescue
from leangrid.storage.journal import Journal
from leangrid.storage.mapped import MappedTensors

_TILE = 1 << 24  # weights dequantized at once
_ALONE = Ranks()
_PRODUCTS = ("calibrate", "hessian")


@dataclass
class BlockWork:
    """The block at work: its module, and what will be committed of it."""

    index: int
    name: str
    module: nn.Module
    run: "Run"
    tensors: dict[str, Tensor] = field(default_factory=dict)
    records: list[LayerRecord] = field(default_factory=list)
    sample: dict[str, Any] | None = None
    resident_bytes: int = 0

    def weight(self, name: str) -> Tensor:
        """The original weight of a linear, [rows, cols] in the compute dtype."""
        weight = self.module.get_parameter(f"{name}.weight").data
        return weight.t() if self.run.skeleton.architecture.layer == "conv1d" else weight

    def rows(self, names: Sequence[str]) -> int:
        """Output features of some linears together."""
        return sum(self.run.skeleton.shape(f"{self.name}.{name}")[0] for name in names)

    def keep(self, name: str, result: LinearResult, hessian: Hessian, factor: Factor) -> Tensor:
        """Pack a solved linear for the commit, record it, and return its new weight as the module stores it."""
        run, full = self.run, f"{self.name}.{name}"
        for stage, seconds in result.seconds.items():
            run.clock.add("solve" if stage == "refine" else stage, seconds)
        rows, cols = result.codes.shape
        least = (flops.exact if run.recipe.parsed.exact else flops.sweep)(rows, cols) + flops.refine(
            rows, cols, run.recipe.refine or 0
        )
        run.clock.work.add(
            "solve", 0.0 if run.recipe.parsed.method == "rtn" else least, result.flops["solve"] + result.flops["refine"]
        )
        run.clock.work.add("baseline", 0.0, result.flops["baseline"])
        parameter = self.module.get_parameter(f"{name}.weight")
        with run.clock.stage("pack"):
            # What a reader of the file multiplies by: rounded to the stored dtype, then computed in ours.
            weight = _dequantized(result.grid, result.codes, run.precision.dtype).to(parameter.device, parameter.dtype)
            codes, grid = result.codes, result.grid
            if run.placement.lean:  # packing needs some bytes a weight for a moment
                codes, grid = codes.cpu(), grid.to("cpu")
            packed = run.format.pack(codes, grid, run.skeleton.dtype, run.stored_schemes[full])
            self.tensors |= {f"{full}.{suffix}": tensor.cpu() for suffix, tensor in packed.items()}
        noted = replace(result, rescues=(*result.rescues, *run.steps))
        record = LayerRecord.of(full, run.recipe.for_layer(full), noted, hessian, factor)
        self.records.append(record)
        if full == run.sampled:
            self.sample = sample_of(full, self.weight(name), result, factor, run.recipe.for_layer(full))
        self.resident_bytes = max(self.resident_bytes, memory.resident_bytes())
        run.tell("layer", self.index, layer=full, loss=record.loss)
        return weight.t().contiguous() if run.skeleton.architecture.layer == "conv1d" else weight


def _dequantized(grid: Grid, codes: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights in the stored dtype, a tile of rows at a time: the float32 steps of a whole layer are several times
    its size."""
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    tile = max(1, _TILE // codes.shape[1])
    for start in range(0, len(codes), tile):
        rows = torch.arange(start, min(start + tile, len(codes)), device=codes.device)
        out[start : start + tile] = grid.take(rows).dequantize(codes[start : start + tile])
    return out


class Run:
    """An open run: holds the journal's lock until it is closed. Use ``Run.open`` in a ``with``."""

    def __init__(
        self,
        prepared: Prepared,
        journal: Journal,
        windows: Tensor,
        device: str,
        clock: Clock,
        progress: Progress | None,
        placement: Placement,
        ranks: Ranks,
    ) -> None:
        self.ranks = ranks
        self.prepared, self.journal, self.windows, self.device, self.clock = prepared, journal, windows, device, clock
        self.skeleton: Skeleton = prepared.skeleton
        self.recipe: Recipe = prepared.recipe
        self.strength: float = prepared.recipe.correct or 0.0
        self.format = FORMATS[self.recipe.format]
        self.precision = self.format.precision(prepared.skeleton.dtype)
        self.stored_schemes = stored_schemes(prepared.skeleton, self.recipe)
        self.sampled = sampled_layer(prepared.skeleton)
        self.calls = Calls()
        self.placement = placement
        self.steps: list[Rescue] = []  # what gave way in the block at work
        self.at: tuple[Failed, int] = ("forward", 0)
        self._mapped = MappedTensors(journal.states)
        self._ahead = Ahead(prepared.skeleton, device, whole_way=not placement.lean) if accelerated(device) else None
        self._progress = progress
        self._done_at_start = journal.resume_point()
        self._began = clock.elapsed()

    @classmethod
    @contextmanager
    def open(
        cls,
        source: str | Path,
        out: str | Path,
        recipe: Recipe,
        windows: Tensor | None,
        device: str,
        overwrite: bool,
        restart: bool,
        state_dir: str | Path | None,
        progress: Progress | None,
        placement: Placement | None = None,
        ranks: Ranks = _ALONE,
    ) -> Iterator["Run"]:
        """Check everything that can be checked, lock the output, get the calibration windows.

        Bad input raises before anything is written, or takes back what was: a fresh ``out.partial`` without a committed
        block is removed again.
        """
        clock = DeviceClock(checked(device))
        start_counting(device)
        with clock.stage("load"):
            prepared = prepare_all(source, out, recipe, windows, device, overwrite, restart, state_dir, progress, ranks)
        journal = prepared.journal
        run = None
        try:
            if prepared.skeleton.architecture.sparse:
                ranks.alone("a mixture of experts")
            own_text = prepared.recipe.calibration == "self" and windows is None
            with clock.stage("load"):
                if own_text:  # a model that is broken writes no text
                    check_values(prepared)
            with clock.stage("calibrate"):
                tokens = ranks.from_first(calibration_windows(prepared, windows, progress) if ranks.first else None)
            with clock.stage("load"):
                if not own_text:  # a text that is refused waits for no weights
                    check_values(prepared)
            chosen: Placement = ranks.from_first(
                placement or _placement(prepared, tokens, device) if ranks.first else None
            )
            ranks.own(tokens)  # refuses fewer windows than ranks, before any work
            run = cls(prepared, journal, tokens, device, clock, progress if ranks.first else None, chosen, ranks)
            yield run
        except LeangridError as error:
            if error.exit_code == 2 and journal.is_fresh and not journal.committed():
                journal.discard()
            raise
        finally:
            if run is not None and run._ahead is not None:
                run._ahead.close()
            journal.close()

    @contextmanager
    def stage(self, name: str, group: int = 0) -> Iterator[None]:
        """Count the time of a stage, in the arithmetic of forward passes and Hessians where it is one of them."""
        self.at = ("forward" if name == "calibrate" else "algebra", group)
        with self.clock.stage(name), products(self.recipe.products if name in _PRODUCTS else "float32"):
            yield

    def count_forward(self, block: BlockWork, done: float) -> None:
        """Count a walked block: each linear once a token and stream is what must be done."""
        names = [name for group in self.skeleton.groups(block.index) for name in group]
        weights = sum(math.prod(self.skeleton.shape(f"{block.name}.{name}")) for name in names)
        streams = 2 if self.strength > 0 else 1
        self.clock.work.add("calibrate", streams * flops.product(weights, 1, self.windows.numel()), done)

    def count_group(self, hessian: Hessian, rows: int, corrected: bool) -> None:
        """Count the sums, the factorization and the correction of a group with ``rows`` output features."""
        counts, cols, streams = self.clock.work, len(hessian.matrix), 2 if self.strength > 0 else 1
        blocks = kernels.outer_block(hessian.matrix.device)
        counts.add(
            "hessian",
            flops.hessian(hessian.tokens, cols, streams),
            flops.hessian(hessian.tokens, cols, streams, min(blocks, cols)),
        )
        moves = [flops.correction(rows, cols, done) if corrected else 0.0 for done in (False, True)]
        counts.add("factor", flops.factor(cols, False) + moves[0], flops.factor(cols, True) + moves[1])

    def algebra_device(self, group: int) -> torch.device:
        """Where the Hessian of ``group`` is summed, factored and solved."""
        return torch.device("cpu" if group in self.placement.host_groups else self.device)

    def streams(self) -> Streams:
        """The hidden states that enter the first block that is not committed yet."""
        done = self.journal.committed()
        if done:
            self.tell("notice", done, message=f"resuming after block {done} of {len(self.skeleton.blocks)}")
            found = (
                self.journal.load_state(done, lambda x: self.keep(x.to(self.skeleton.compute_dtype)))
                if self.ranks.first
                else None
            )
            state = self.ranks.from_first(found)
            if state is None:
                raise Interrupted(
                    "the hidden states of the unfinished run were lost",
                    self.journal.partial,
                    "Run the same command again",
                )
            streams = Streams.from_tensors(state)
            self.ranks.keep_own(streams)
            return streams
        batches = self.ranks.own(self.windows).split(self.placement.windows)
        with self.stage("calibrate"):
            hidden, self.calls = embed(self.skeleton, batches, self.device, self.keep)
        return Streams(hidden, list(hidden) if self.strength > 0 else None)

    def place(self, streams: Streams) -> None:
        """Cut and move the streams, where they are, to what the placement asks for."""
        streams.rebatch(self.placement.windows)
        streams.move(self.keep)
        for size in {len(x) for x in streams.quantized} - self.calls.by_batch.keys():
            with self.stage("calibrate"):
                self.calls.by_batch |= embed(self.skeleton, [self.windows[:size]], self.device)[1].by_batch

    def keep(self, hidden: Tensor) -> Tensor:
        """A batch of hidden states where it waits for its turn."""
        if self.placement.disk_streams:
            return self._mapped.keep(hidden)
        return to_host(hidden) if self.placement.host_streams else hidden.to(self.device)

    def take(self, hidden: Tensor, device: torch.device) -> Tensor:
        """A batch that waited, where it is needed now."""
        return (
            self._mapped.take(hidden, device) if self.placement.disk_streams else hidden.to(device, non_blocking=True)
        )

    def give_way(self, index: int) -> None:
        """After block ``index`` ran out of memory: one step down the ladder, said and recorded. Interrupted at its
        end."""
        if self.ranks.count > 1:
            what = f"out of memory, and {self.ranks.count} ranks do not give way"
            raise Interrupted(
                what,
                self.skeleton.block_name(index),
                "Finished blocks are kept: free memory, or go on with one process",
            )
        gc.collect()
        release_cached(self.device)
        step = self.placement.thriftier(*self.at, len(self.skeleton.groups(index)), accelerated(self.device))
        if step is None:
            needed = footprint(
                Demand.of(self.skeleton, self.recipe, self.windows.shape[0], self.windows.shape[1], self.device),
                self.placement,
            ).peak
            raise Interrupted(
                f"out of memory, and nothing is left to give way: a block needs about {needed / 2**30:.2f} GiB",
                self.skeleton.block_name(index),
                "Finished blocks are kept: free memory, or go on with more of it",
            )
        self.placement, words = step
        self.steps.append(Rescue("memory", f"out of memory: {words}"))
        if self._ahead is not None:
            self._ahead.whole_way = not self.placement.lean and not self.placement.host_block
        self.tell("notice", index, message=f"out of memory in {self.skeleton.block_name(index)}: {words}, from here on")

    def remaining_blocks(self) -> range:
        """Indices of the blocks that are not committed yet, in order."""
        return range(self.journal.committed(), len(self.skeleton.blocks))

    @contextmanager
    def block(self, index: int) -> Iterator[BlockWork]:
        """Block ``index`` with its weights in memory."""
        with self.stage("load"):
            weights = None if self._ahead is None else self._ahead.take(index)
            context = self.skeleton.block(index, "cpu" if self.placement.host_block else self.device, weights)
            del weights
            module = context.__enter__()
            if self.ranks.count > 1:  # a look at 16 places of each file has shown them to be alike; this is all of it
                self.ranks.agree(**{f"the weights of {self.skeleton.block_name(index)}": checksum(module)})
        if self._ahead is not None:
            self._ahead.start(index + 1)
        elif index + 1 < len(self.skeleton.blocks):
            self.prepared.checkpoint.expect(self.skeleton.block_sources(index + 1))
        try:
            yield BlockWork(index, self.skeleton.block_name(index), module, self)
        finally:
            context.__exit__(None, None, None)

    def commit(self, block: BlockWork, streams: Streams) -> Streams:
        """Make the block durable, then the streams that leave it; return them."""
        whole = self.ranks.whole(streams)
        if not self.ranks.first:
            return streams
        with self.clock.stage("save"):
            quantized = {f"{r.name}.weight" for r in block.records}
            rest = [n for n in self.skeleton.parameter_names() if n.startswith(f"{block.name}.") and n not in quantized]
            tensors = block.tensors | {name: self.skeleton.stored(name) for name in rest}
            info = {
                "records": [record.to_json() for record in block.records],
                "device": self.device,
                "kernels": kernels.backend(self.device),
                "products": self.recipe.products,
                "threads": torch.get_num_threads(),
                "ranks": self.ranks.count,
                "placement": self.placement.to_json(),
                "memory": [f"{block.name}: {step.detail}" for step in self.steps],
                "seconds": self.clock.lap(),
                "resident_bytes": block.resident_bytes,
                "peak_ram_bytes": memory.peak_bytes(),
                "peak_gpu_bytes": peak_bytes(self.device),
                "sample": block.sample,
            }
            self.steps = []
            self.journal.commit_block(block.index, tensors, info)
            if block.index + 1 < len(self.skeleton.blocks):
                self.journal.save_state(block.index + 1, whole.tensors())
        self.tell("block", block.index, loss=sum(record.loss for record in block.records))
        return streams

    def publish(self, max_rescued: float, max_kl: float | None = None) -> QuantizeResult:
        """Write the finished directory, hold it against the original, write the manifest, and give it its final
        name."""
        self.tell("save", len(self.skeleton.blocks) - 1)
        memory.return_free()  # what the blocks left: writing the result needs pieces of other sizes
        judged_on = "cpu" if self.placement.host_block else self.device
        result = publish(self.prepared, self.windows, self.clock, self.device, max_rescued, max_kl, judged_on)
        for warning in result.quality.get("warnings", []):
            self.tell("notice", len(self.skeleton.blocks), message=f"warning: {warning}")
        return result

    def tell(self, stage: str, block: int, layer: str = "", loss: float = 0.0, message: str = "") -> None:
        """Send an Event to whoever watches."""
        if self._progress is None:
            return
        blocks, seconds = len(self.skeleton.blocks), self.clock.elapsed() - self._began
        done = block + (stage == "block") - self._done_at_start
        left = seconds / done * (blocks - self._done_at_start - done) if done > 0 else -1.0
        speed = self.windows.numel() * done / seconds if done > 0 else 0.0
        self._progress(Event(stage, block, blocks, layer, loss, speed, memory.resident_bytes(), left, message))


def _placement(prepared: Prepared, windows: Tensor, device: str) -> Placement:
    """Where the last committed block ended; else the first that fits by the plan's sums."""
    done = prepared.journal.resume_point()
    kept = prepared.journal.block_info(done - 1) if done else {}
    if kept.get("device") == device and "placement" in kept:
        return Placement.from_json(kept["placement"])
    return choose(prepared.skeleton, prepared.recipe, windows.shape[0], windows.shape[1], device)[0]

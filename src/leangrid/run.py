"""One run on disk: what it works on, what is already committed, and how it ends. The hallway asks, this room answers."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from leangrid import kernels, memory
from leangrid.clock import Clock
from leangrid.errors import Interrupted, LeangridError
from leangrid.factor import Factor
from leangrid.formats import FORMATS
from leangrid.hessian import Hessian
from leangrid.linear import LinearResult
from leangrid.models.skeleton import Skeleton
from leangrid.models.walk import Calls, Streams, embed
from leangrid.precision import products
from leangrid.prepare import Prepared, calibration_windows, prepare
from leangrid.progress import Event, Progress
from leangrid.publish import publish
from leangrid.recipe import Recipe
from leangrid.report.records import LayerRecord
from leangrid.result import QuantizeResult
from leangrid.storage.journal import Journal

_TOKENS_A_BATCH = 4096  # large enough for full-speed products, small enough for the cache


@dataclass
class BlockWork:
    """The block at work: its module, and what will be committed of it."""

    index: int
    name: str
    module: nn.Module
    run: "Run"
    tensors: dict[str, Tensor] = field(default_factory=dict)
    records: list[LayerRecord] = field(default_factory=list)

    def weight(self, name: str) -> Tensor:
        """The original weight of a linear, float32 [rows, cols]."""
        weight = self.module.get_parameter(f"{name}.weight").data
        return (weight.t() if self.run.skeleton.architecture.layer == "conv1d" else weight).float().contiguous()

    def rows(self, names: Sequence[str]) -> int:
        """Output features of some linears together."""
        return sum(self.run.skeleton.shape(f"{self.name}.{name}")[0] for name in names)

    def keep(self, name: str, result: LinearResult, hessian: Hessian, factor: Factor) -> Tensor:
        """Pack a solved linear for the commit, record it, and return its new weight as the module stores it."""
        run, full = self.run, f"{self.name}.{name}"
        for stage, seconds in result.seconds.items():
            run.clock.add("solve" if stage == "refine" else stage, seconds)
        with run.clock.stage("pack"):
            packed = run.format.pack(result.codes, result.grid, run.skeleton.dtype, run.recipe.parsed)
            self.tensors |= {f"{full}.{suffix}": tensor for suffix, tensor in packed.items()}
            # What a reader of the file multiplies by: rounded to the stored dtype, then computed in ours.
            weight = result.grid.dequantize(result.codes).to(run.skeleton.dtype)
            weight = weight.to(self.module.get_parameter(f"{name}.weight").dtype)
        record = LayerRecord.of(full, run.recipe, result, hessian, factor)
        self.records.append(record)
        run.tell("layer", self.index, layer=full, loss=record.loss)
        return weight.t().contiguous() if run.skeleton.architecture.layer == "conv1d" else weight


class Run:
    """An open run: holds the journal's lock until it is closed. Use ``Run.open`` in a ``with``."""

    def __init__(self, prepared: Prepared, journal: Journal, windows: Tensor, device: str, clock: Clock, progress: Progress | None) -> None:
        self.prepared, self.journal, self.windows, self.device, self.clock = prepared, journal, windows, device, clock
        self.skeleton: Skeleton = prepared.skeleton
        self.recipe: Recipe = prepared.recipe
        self.strength: float = prepared.recipe.correct or 0.0
        self.format = FORMATS[self.recipe.format]
        self.calls = Calls()
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
    ) -> Iterator["Run"]:
        """Check everything that can be checked, lock the output, get the calibration windows.

        Bad input raises before anything is written, or takes back what was: a fresh ``out.partial`` without a committed
        block is removed again.
        """
        clock = Clock()
        with clock.stage("load"):
            prepared = prepare(source, out, recipe, windows, device, overwrite, restart, state_dir, progress)
        journal = prepared.journal
        try:
            with clock.stage("calibrate"):
                tokens = calibration_windows(prepared, windows, progress)
            yield cls(prepared, journal, tokens, device, clock, progress)
        except LeangridError as error:
            if error.exit_code == 2 and journal.is_fresh and not journal.committed():
                journal.discard()
            raise
        finally:
            journal.close()

    def products(self) -> AbstractContextManager[None]:
        """The arithmetic of forward passes and Hessians, for the length of a ``with``."""
        return products(self.recipe.products)

    def streams(self) -> Streams:
        """The hidden states that enter the first block that is not committed yet."""
        batch = max(1, _TOKENS_A_BATCH // self.windows.shape[1])
        batches: Sequence[Tensor] = self.windows.split(batch)
        with self.clock.stage("calibrate"), self.products():
            hidden, self.calls = embed(self.skeleton, batches, self.device)
        done = self.journal.committed()
        if done:
            self.tell("notice", done, message=f"resuming after block {done} of {len(self.skeleton.blocks)}")
            state = self.journal.load_state(done)
            if state is None:
                raise Interrupted("the hidden states of the unfinished run were lost", self.journal.partial, "Run the same command again")
            return Streams.from_tensors({name: x.to(self.device) for name, x in state.items()})
        return Streams(hidden, list(hidden) if self.strength > 0 else None)

    def remaining_blocks(self) -> range:
        """Indices of the blocks that are not committed yet, in order."""
        return range(self.journal.committed(), len(self.skeleton.blocks))

    @contextmanager
    def block(self, index: int) -> Iterator[BlockWork]:
        """Block ``index`` with its weights in memory."""
        with self.clock.stage("load"):
            context = self.skeleton.block(index, self.device)
            module = context.__enter__()
        try:
            yield BlockWork(index, self.skeleton.block_name(index), module, self)
        finally:
            context.__exit__(None, None, None)

    def commit(self, block: BlockWork, streams: Streams) -> Streams:
        """Make the block durable, then the streams that leave it; return them."""
        with self.clock.stage("save"):
            quantized = {f"{r.name}.weight" for r in block.records}
            rest = [n for n in self.skeleton.parameter_names() if n.startswith(f"{block.name}.") and n not in quantized]
            tensors = block.tensors | {name: self.skeleton.stored(name) for name in rest}
            info = {
                "records": [record.to_json() for record in block.records],
                "device": self.device,
                "kernels": kernels.backend(),
                "products": self.recipe.products,
                "threads": torch.get_num_threads(),
            }
            self.journal.commit_block(block.index, tensors, info)
            if block.index + 1 < len(self.skeleton.blocks):
                self.journal.save_state(block.index + 1, streams.tensors())
        self.tell("block", block.index, loss=sum(record.loss for record in block.records))
        return streams

    def publish(self, max_rescued: float) -> QuantizeResult:
        """Write the finished directory, the manifest last, and give it its final name."""
        self.tell("save", len(self.skeleton.blocks) - 1)
        return publish(self.prepared, self.windows, self.clock, self.device, max_rescued)

    def tell(self, stage: str, block: int, layer: str = "", loss: float = 0.0, message: str = "") -> None:
        """Send an Event to whoever watches."""
        if self._progress is None:
            return
        blocks, seconds = len(self.skeleton.blocks), self.clock.elapsed() - self._began
        done = block + (stage == "block") - self._done_at_start
        left = seconds / done * (blocks - self._done_at_start - done) if done > 0 else -1.0
        speed = self.windows.numel() * done / seconds if done > 0 else 0.0
        self._progress(Event(stage, block, blocks, layer, loss, speed, memory.resident_bytes(), left, message))

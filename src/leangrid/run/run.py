"""A run while it is open: the model, what is committed already, the hidden states, and how a block enters and leaves.

``open_run`` makes it; quantize.py asks it for one block after another.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from leangrid import kernels
from leangrid.errors import Interrupted
from leangrid.formats import FORMATS
from leangrid.grids import Grid
from leangrid.machine import memory
from leangrid.machine.arithmetic import use_products
from leangrid.machine.devices import DeviceClock, has_own_memory, is_out_of_memory, peak_bytes
from leangrid.models.prefetch import Prefetch
from leangrid.models.streams import Calls, Streams, embed
from leangrid.models.walk import BlockWalk
from leangrid.planning.sizes import stored_schemes
from leangrid.progress import Event
from leangrid.report.records import LayerRecord
from leangrid.report.sample import choose_sampled_layer, sample_row
from leangrid.run.accounting import Accounting, LayerCosts
from leangrid.run.block import Block
from leangrid.run.inputs import RunInputs
from leangrid.run.publish import publish_result
from leangrid.run.ranks import Ranks, checksum
from leangrid.run.result import QuantizeResult
from leangrid.run.states import StatePlaces
from leangrid.solve.factor import Factor
from leangrid.solve.hessian import Hessian
from leangrid.solve.layer import LinearResult
from leangrid.storage.mapped import MappedTensors

_TILE = 1 << 24  # weights dequantized at once
_FAST_PRODUCTS = ("calibrate", "hessian")  # stages in the recipe's arithmetic; everything that is solved is in float32


class Run:
    """An open run; it holds the journal's lock until ``open_run`` closes it.

    Attributes:
        windows: the calibration tokens of all ranks, int64 [samples, length].
        recipe: with every default written out for this model.
        strength: a, the share of the inputs' own error that is corrected (0: one stream is enough).
        precision: what the container keeps scales and levels in.
    """

    def __init__(self, inputs: RunInputs, windows: Tensor, clock: DeviceClock, ranks: Ranks) -> None:
        self.inputs, self.windows, self.clock, self.ranks = inputs, windows, clock, ranks
        self.skeleton, self.recipe, self.journal = inputs.skeleton, inputs.recipe, inputs.journal
        self.device = inputs.request.device
        self.strength: float = self.recipe.correct or 0.0
        self.format = FORMATS[self.recipe.format]
        self.precision = self.format.precision(self.skeleton.dtype)
        self.states = StatePlaces(inputs.placement, self.device, MappedTensors(self.journal.states))
        self.accounting = Accounting(clock, self.skeleton, self.recipe, windows.numel())
        self._stored_schemes = stored_schemes(self.skeleton, self.recipe)
        self._sampled = choose_sampled_layer(self.skeleton)
        self._calls = Calls()
        self._prefetch: Prefetch | None = None
        if has_own_memory(self.device):
            self._prefetch = Prefetch(self.skeleton, self.device, to_device=not inputs.placement.in_place)
        self._progress = inputs.request.progress if ranks.first else None
        self._done_at_start = self.journal.find_resume_point()
        self._began = clock.elapsed()

    def close(self) -> None:
        """End the thread that reads weights ahead."""
        if self._prefetch is not None:
            self._prefetch.close()

    @contextmanager
    def stage(self, name: str, group: int = 0) -> Iterator[None]:
        """Count the body's time as stage ``name``, and compute its products in that stage's arithmetic."""
        self.states.failing = ("forward" if name == "calibrate" else "algebra", group)
        with self.clock.stage(name), use_products(self.recipe.products if name in _FAST_PRODUCTS else "float32"):
            yield

    def remaining_blocks(self) -> range:
        """Indices of the blocks that are not committed yet, in order."""
        return range(self.journal.count_committed(), len(self.skeleton.blocks))

    def streams(self) -> Streams:
        """The hidden states that enter the first block that is not committed yet."""
        done = self.journal.count_committed()
        if not done:
            batches = self.ranks.share(self.windows).split(self.states.placement.windows)
            with self.stage("calibrate"):
                hidden, self._calls = embed(self.skeleton, batches, self.device, self.states.put)
            return Streams(hidden, list(hidden) if self.strength > 0 else None)
        self.tell("notice", done, message=f"resuming after block {done} of {len(self.skeleton.blocks)}")
        dtype, found = self.skeleton.compute_dtype, None
        if self.ranks.first:
            found = self.journal.load_state(done, lambda hidden: self.states.put(hidden.to(dtype)))
        tensors = self.ranks.broadcast(found)
        if tensors is None:
            what = "the hidden states of the unfinished run were lost"
            raise Interrupted(what, self.journal.partial, "Run the same command again")
        streams = Streams.from_tensors(tensors)
        self.ranks.cut_to_share(streams)
        return streams

    def attempt(self, quantize: Callable[["Run", int, Streams], Streams], index: int, streams: Streams) -> Streams:
        """``quantize`` block ``index``; where memory runs out, begin the block again with the next smaller placement.

        Raises:
            Interrupted: there is no smaller one.
        """
        while True:
            try:
                self._place(streams)
                return quantize(self, index, streams)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            self._reduce(index)  # after the except: an error holds on to every tensor of the attempt

    @contextmanager
    def open_block(self, index: int, streams: Streams) -> Iterator[Block]:
        """Block ``index`` with its weights in memory and the streams before it."""
        placement = self.states.placement
        name, context = self.skeleton.block_name(index), None
        with self.stage("load"):
            weights = None if self._prefetch is None else self._prefetch.weights_of(index)
            context = self.skeleton.load_block(index, "cpu" if placement.host_block else self.device, weights)
            del weights
            module = context.__enter__()
            if self.ranks.count > 1:  # a look at 16 places of each file has shown them to be alike; this is all of it
                self.ranks.require_agreement(**{f"the weights of {name}": checksum(module)})
        self._expect(index + 1)
        try:
            groups, states = self.skeleton.groups(index), self.states
            walk = BlockWalk(
                module,
                groups,
                self._calls,
                index,
                streams,
                placement.replay,
                placement.in_place,
                states.get,
                states.put,
            )
            yield Block(index, name, module, walk)
        finally:
            context.__exit__(None, None, None)

    def weight(self, block: Block, name: str) -> Tensor:
        """The original weight of a linear, [rows, cols] in the compute dtype."""
        return self.skeleton.architecture.transposed(block.parameter(name).data)

    def store(
        self, block: Block, name: str, result: LinearResult, costs: LayerCosts, hessian: Hessian, factor: Factor
    ) -> None:
        """Take a solved linear into its block: pack it, record it, and let the quantized stream go on with it."""
        path = f"{block.name}.{name}"
        self.accounting.count_layer(result.codes.shape, costs)
        with self.clock.stage("pack"):
            weight = self._stored_weight(block, name, result)
            block.tensors |= self._packed(path, result)
        noted = replace(result, rescues=(*result.rescues, *self.states.reductions))
        record = LayerRecord.of(path, self.recipe.for_layer(path), noted, hessian, factor, costs.seconds)
        block.records.append(record)
        if path == self._sampled:
            original = self.weight(block, name)
            block.sample = sample_row(path, original, result, factor, self.recipe.for_layer(path))
        block.resident_bytes = max(block.resident_bytes, memory.resident_bytes())
        block.replace(name, self.skeleton.architecture.transposed(weight).contiguous())
        self.tell("layer", block.index, layer=path, loss=record.loss)

    def commit(self, block: Block) -> Streams:
        """Make the block durable, then the streams that leave it; returns them."""
        self.accounting.count_forward(block.index, block.walk.flops)
        streams = block.walk.finished()
        whole = self.ranks.gather_streams(streams)
        if not self.ranks.first:
            return streams
        with self.clock.stage("save"):
            quantized = {f"{record.name}.weight" for record in block.records}
            within = (name for name in self.skeleton.parameter_names() if name.startswith(f"{block.name}."))
            rest = {name: self.skeleton.read(name) for name in within if name not in quantized}
            self.journal.commit_block(block.index, block.tensors | rest, self._info(block))
            self.states.reductions = []
            if block.index + 1 < len(self.skeleton.blocks):
                self.journal.save_state(block.index + 1, whole.tensors())
        self.tell("block", block.index, loss=sum(record.loss for record in block.records))
        return streams

    def publish(self) -> QuantizeResult:
        """Write the finished directory, hold it against the original, write the manifest, give it its final name."""
        return self.ranks.broadcast(self._publish() if self.ranks.first else None)

    def tell(self, stage: str, block: int, layer: str = "", loss: float = 0.0, message: str = "") -> None:
        """Send an Event to whoever watches."""
        if self._progress is None:
            return
        blocks, seconds = len(self.skeleton.blocks), self.clock.elapsed() - self._began
        done = block + (stage == "block") - self._done_at_start
        left = seconds / done * (blocks - self._done_at_start - done) if done > 0 else -1.0
        speed = self.windows.numel() * done / seconds if done > 0 else 0.0
        self._progress(Event(stage, block, blocks, layer, loss, speed, memory.resident_bytes(), left, message))

    def _publish(self) -> QuantizeResult:
        self.tell("save", len(self.skeleton.blocks) - 1)
        memory.return_freed_memory()  # what the blocks left: writing the result needs pieces of other sizes
        judged_on = "cpu" if self.states.placement.host_block else self.device
        result = publish_result(self.inputs, self.windows, self.clock, judged_on)
        for warning in result.quality.get("warnings", []):
            self.tell("notice", len(self.skeleton.blocks), message=f"warning: {warning}")
        return result

    def _place(self, streams: Streams) -> None:
        """Cut and move the streams, where they are, to what the placement asks for."""
        streams.rebatch(self.states.placement.windows)
        streams.move(self.states.put)
        for size in {len(batch) for batch in streams.quantized} - self._calls.by_batch.keys():
            with self.stage("calibrate"):
                self._calls.by_batch |= embed(self.skeleton, [self.windows[:size]], self.device)[1].by_batch

    def _reduce(self, index: int) -> None:
        """Use less memory from block ``index`` on, said and recorded."""
        name = self.skeleton.block_name(index)
        if self.ranks.count > 1:
            what = f"out of memory, and {self.ranks.count} ranks cannot do with less"
            raise Interrupted(what, name, "Finished blocks are kept: free memory, or go on with one process")
        words = self.states.reduce(self.skeleton, self.recipe, self.windows, index)
        if self._prefetch is not None:
            self._prefetch.to_device = not self.states.placement.in_place and not self.states.placement.host_block
        self.tell("notice", index, message=f"out of memory in {name}: {words}, from here on")

    def _expect(self, index: int) -> None:
        """Begin to read block ``index``, where there is one."""
        if self._prefetch is not None:
            self._prefetch.begin(index)
        elif index < len(self.skeleton.blocks):
            self.inputs.checkpoint.prefetch(self.skeleton.block_sources(index))

    def _stored_weight(self, block: Block, name: str, result: LinearResult) -> Tensor:
        """What a reader of the file multiplies by, [rows, cols]: rounded to the stored dtype, then computed in ours."""
        parameter = block.parameter(name)
        weight = _dequantized(result.grid, result.codes, self.precision.dtype)
        return weight.to(parameter.device, parameter.dtype)

    def _packed(self, path: str, result: LinearResult) -> dict[str, Tensor]:
        """The tensors of the container, by their names in the result, on the CPU."""
        codes, grid = result.codes, result.grid
        if self.states.placement.in_place:  # packing needs some bytes a weight for a moment
            codes, grid = codes.cpu(), grid.to("cpu")
        packed = self.format.pack(codes, grid, self.skeleton.dtype, self._stored_schemes[path])
        return {f"{path}.{suffix}": tensor.cpu() for suffix, tensor in packed.items()}

    def _info(self, block: Block) -> dict[str, object]:
        """What the journal says of a committed block, beside its tensors."""
        return {
            "records": [record.to_json() for record in block.records],
            "device": self.device,
            "kernels": kernels.backend(self.device),
            "products": self.recipe.products,
            "threads": torch.get_num_threads(),
            "ranks": self.ranks.count,
            "placement": self.states.placement.to_json(),
            "memory": [f"{block.name}: {reduction.detail}" for reduction in self.states.reductions],
            "seconds": self.clock.lap(),
            "resident_bytes": block.resident_bytes,
            "peak_ram_bytes": memory.peak_bytes(),
            "peak_gpu_bytes": peak_bytes(self.device),
            "sample": block.sample,
        }


def _dequantized(grid: Grid, codes: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights in ``dtype``, a tile of rows at a time: the float32 steps of a layer are several times its size."""
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    tile = max(1, _TILE // codes.shape[1])
    for start in range(0, len(codes), tile):
        rows = torch.arange(start, min(start + tile, len(codes)), device=codes.device)
        out[start : start + tile] = grid.select_rows(rows).dequantize(codes[start : start + tile])
    return out

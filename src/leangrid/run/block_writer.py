"""Takes what was solved into its block (packed, recorded, back into the model), and makes finished blocks durable."""

import time
from dataclasses import replace

import torch
from torch import Tensor

from leangrid import kernels
from leangrid.formats import FORMATS
from leangrid.machine import memory
from leangrid.machine.devices import describe_gpu, peak_device_bytes
from leangrid.machine.stopwatch import Clock
from leangrid.models.streams import Streams
from leangrid.planning.readers import merges_experts
from leangrid.planning.sizes import stored_schemes
from leangrid.report.records import LayerRecord
from leangrid.report.sample import choose_sampled_layer, sample_row
from leangrid.run.accounting import Accounting, SolvedLinear
from leangrid.run.block import Block
from leangrid.run.inputs import RunInputs
from leangrid.run.ranks import Ranks
from leangrid.run.run_progress import RunProgress
from leangrid.run.states import StatePlaces
from leangrid.solve.layer import LinearResult
from leangrid.solve.rescue import Rescue
from leangrid.storage.state_schedule import StateSchedule


class BlockWriter:
    """The way from solved linears to a committed block.

    Attributes:
        reductions: how less memory was used for the block at work ("memory"), and what else did not go as asked before
            it; recorded with it.
    """

    def __init__(
        self,
        inputs: RunInputs,
        states: StatePlaces,
        clock: Clock,
        accounting: Accounting,
        progress: RunProgress,
        ranks: Ranks,
    ) -> None:
        self.reductions: list[Rescue] = []
        self._skeleton, self._recipe, self._journal = inputs.skeleton, inputs.recipe, inputs.journal
        self._device = inputs.request.device
        self._states, self._clock, self._accounting = states, clock, accounting
        self._progress, self._ranks = progress, ranks
        self._format = FORMATS[inputs.recipe.format]
        self._schemes = stored_schemes(inputs.skeleton, inputs.recipe)
        self._sampled = choose_sampled_layer(inputs.skeleton)
        self._schedule = StateSchedule()

    def store(self, block: Block, solved: SolvedLinear) -> None:
        """Take a solved linear: pack it, record it, and queue its new weight for the quantized stream."""
        name, result, path = solved.name, solved.result, block.path(solved.name)
        self._accounting.count_layer(result.codes.shape, solved.costs)
        if self._recipe.tune:
            block.solved[name], block.originals[name] = solved, block.weight(name)
        weight = self._pack(block, solved)
        self._record(block, solved)
        block.resident_bytes = max(block.resident_bytes, memory.resident_bytes())
        block.queue_weight(name, weight)
        self._progress.report("layer", block.index, layer=path, loss=block.records[-1].loss)

    def replace(self, block: Block, solved: SolvedLinear) -> Tensor:
        """Take other codes and another grid of a linear that was stored; what a reader multiplies by, [rows, cols]."""
        if block.path(solved.name) == self._sampled:
            self._sample(block, solved)
        return self._pack(block, solved)

    def commit(self, block: Block, streams: Streams) -> Streams:
        """Make the block durable, then the streams that leave it; returns these (of several ranks, this one's part)."""
        self._accounting.count_forward(block.index, block.walk.flops)
        whole = self._ranks.gather_streams(streams) if self._journal.keeps_states else streams
        if self._ranks.first:
            self._save(block, whole)
        if not self._journal.keeps_states:  # the streams go on through what the journal holds (catch_up.py)
            self._ranks.wait_for_first()
        return streams

    def _save(self, block: Block, whole: Streams) -> None:
        """Write the block, and the states of all ranks that leave it."""
        with self._clock.stage("save"):
            plain = self._skeleton.plain_tensors(block.index, merges_experts(self._recipe))
            rest = {name: read() for name, _, read in plain}
            self._journal.commit_block(block.index, block.tensors | rest, self._info(block))
            self.reductions = []
            if self._journal.keeps_states and block.index + 1 < self._progress.blocks:
                self._save_states(block.index + 1, whole)
        self._progress.report("block", block.index, loss=sum((record.loss for record in block.records), 0.0))

    def _save_states(self, index: int, whole: Streams) -> None:
        """Save the states that enter block ``index``, unless a run that is stopped had better compute them again."""
        tensors = whole.tensors()
        size, began = sum(tensor.nbytes for tensor in tensors.values()), time.monotonic()
        if self._journal.computes_states and not self._schedule.is_due(size):
            return
        self._journal.save_state(index, tensors)
        self._schedule.note_saved(size, time.monotonic() - began)

    def _record(self, block: Block, solved: SolvedLinear) -> None:
        """The line of records.jsonl; of one layer of the model also a row, for the report."""
        path, result = block.path(solved.name), solved.result
        recipe = self._recipe.for_layer(path)
        noted = replace(result, rescues=(*result.rescues, *self.reductions))
        block.records.append(LayerRecord.of(path, recipe, noted, solved.factor, solved.costs.seconds, solved.share))
        if path == self._sampled:
            self._sample(block, solved)

    def _sample(self, block: Block, solved: SolvedLinear) -> None:
        """One row of the linear, for the report."""
        path, weight = block.path(solved.name), block.originals.get(solved.name)
        weight = block.weight(solved.name) if weight is None else weight
        recipe = self._recipe.for_layer(path)
        block.sample = sample_row(path, weight, solved.result, solved.factor, recipe)

    def _pack(self, block: Block, solved: SolvedLinear) -> Tensor:
        """Put the container's tensors of a linear into the block; what a reader multiplies by, [rows, cols]."""
        with self._clock.stage("pack"):
            block.tensors |= self._packed(block.path(solved.name), solved.result)
            return self._stored_weight(block, solved.name, solved.result)

    def _stored_weight(self, block: Block, name: str, result: LinearResult) -> Tensor:
        """What a reader of the file multiplies by, [rows, cols]: rounded to the stored dtype, then computed in ours."""
        parameter = block.parameter(name)
        weight = self._format.dequantize(result.codes, result.grid, self._skeleton.dtype)
        return weight.to(parameter.device, parameter.dtype)

    def _packed(self, path: str, result: LinearResult) -> dict[str, Tensor]:
        """The tensors of the container, by their names in the result, on the CPU."""
        codes, grid = result.codes, result.grid
        if self._states.placement.in_place:  # packing needs some bytes a weight for a moment
            codes, grid = codes.cpu(), grid.to("cpu")
        packed = self._format.pack(codes, grid, self._skeleton.dtype, self._schemes[path])
        return {f"{path}.{suffix}": tensor.cpu() for suffix, tensor in packed.items()}

    def _info(self, block: Block) -> dict[str, object]:
        """What the journal says of a committed block, beside its tensors."""
        return {
            "records": [record.to_json() for record in block.records],
            "device": self._device,
            "gpu": describe_gpu(self._device),
            "kernels": kernels.backend(self._device),
            "products": self._recipe.products,
            "threads": torch.get_num_threads(),
            "ranks": self._ranks.count,
            "placement": self._states.placement.to_json(),
            "memory": [
                f"{block.name}: {reduction.detail}" for reduction in self.reductions if reduction.kind == "memory"
            ],
            "seconds": self._clock.lap(),
            "resident_bytes": block.resident_bytes,
            "peak_ram_bytes": memory.peak_bytes(),
            "peak_gpu_bytes": peak_device_bytes(self._device),
            "sample": block.sample,
            **({} if block.tuning is None else {"block": block.name, "tuning": block.tuning.to_json()}),
        }

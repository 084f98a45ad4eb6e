"""The hallway: a checkpoint in, a quantized checkpoint out. It reads as the paper's Algorithm 1.

For each decoder block, for each group of linears that share an input: collect the Hessian, factor it once, then for each
linear correct the target, fit the grid, solve, pack; replace; let the activations go on; commit the block.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from leangrid.correction import Correction, correct
from leangrid.factor import factorize
from leangrid.hessian import Hessian, HessianSum
from leangrid.linear import LinearResult, solve_linear
from leangrid.models.walk import BlockWalk, GroupInputs, Streams
from leangrid.precision import operand
from leangrid.progress import Event
from leangrid.publish import finished_result
from leangrid.recipe import Recipe
from leangrid.result import QuantizeResult
from leangrid.run import Run


def quantize(
    source: str | Path,
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    windows: Tensor | None = None,
    device: str = "cpu",
    threads: int | None = None,
    overwrite: bool = False,
    restart: bool = False,
    max_rescued: float = 0.01,
    state_dir: str | Path | None = None,
    progress: Callable[[Event], None] | None = None,
) -> QuantizeResult:
    """Quantize the model in ``source`` into the directory ``out``.

    Until it is complete the result is called ``out.partial``; the same call again resumes it.

    Args:
        source: checkpoint directory, hub id ``org/name[@revision]``, or ``.gguf`` file.
        recipe: what to do; its defaults where None.
        windows: calibration token ids, int64 [samples, length], instead of the recipe's corpus.
        device: where the blocks are computed.
        threads: CPU threads; torch's own choice where None.
        overwrite: replace ``out`` if it is one of our results.
        restart: throw away an unfinished run that does not match.
        max_rescued: share of layers that may need a rescue before the exit code becomes 4.
        state_dir: where the hidden states between blocks are kept; beside the result where None.
        progress: is called with an Event after every layer and block.

    Raises:
        LeangridError: bad input (nothing was written) or a stop (the same call resumes).
    """
    if threads is not None:
        torch.set_num_threads(threads)
    recipe = recipe or Recipe.build()
    complete = finished_result(Path(out), None if state_dir is None else Path(state_dir), max_rescued)
    if complete is not None:
        return complete
    with torch.no_grad(), Run.open(source, out, recipe, windows, device, overwrite, restart, state_dir, progress) as run:
        streams = run.streams()
        for index in run.remaining_blocks():
            streams = quantize_block(run, index, streams)
        return run.publish(max_rescued)


def quantize_block(run: Run, index: int, streams: Streams) -> Streams:
    """Quantize block ``index``, commit it, and return the streams that enter the next one."""
    with run.block(index) as block:
        walk = BlockWalk(block.module, run.skeleton.architecture.groups, run.calls, index, streams)
        inputs = iter(walk)
        while True:
            with run.clock.stage("calibrate"), run.products():
                group = next(inputs, None)
            if group is None:
                break
            with run.clock.stage("hessian"), run.products():
                hessian = hessian_of(group)
            with run.clock.stage("factor"):
                factor = factorize(hessian.matrix, run.recipe.damping, run.recipe.act_order)
                correction = None
                if hessian.cross is not None and not factor.is_diagonal:
                    correction = Correction.of(hessian.matrix, hessian.cross, factor, block.rows(group.names))
            for name in group.names:
                with run.clock.stage("factor"):
                    target = correct(block.weight(name), correction, run.strength)
                result: LinearResult = solve_linear(target, factor, hessian.matrix, run.recipe, run.skeleton.dtype)
                walk.replace(name, block.keep(name, result, hessian, factor))
        return run.commit(block, walk.finished())


def hessian_of(group: GroupInputs) -> Hessian:
    """H (and, with two streams, G) of the input that the group's linears share."""
    total = HessianSum(group.quantized[0].shape[-1], group.quantized[0].device, cross=group.original is not None)
    for i, quantized in enumerate(group.quantized):
        if group.original is None:
            total.add(operand(quantized))
        else:
            total.add_pair(operand(group.original[i]), operand(quantized))
    return total.finish()

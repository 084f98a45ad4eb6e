"""A checkpoint in, a quantized checkpoint out: LeanQuant's Algorithm 1, block after block.

    for each decoder block                                        quantize_block
        for each group of linears that read the same input
            H = 2/N X~^T X~, G = 2/N X^T X~                       collect      (solve/hessian.py)
            (H + lambda I)^-1 = U^T U                             factorize    (solve/factor.py)
            for each linear
                W~ = W + a W (G - H)(H + lambda I)^-1             targets      (solve/correction.py)
                fit the grid, sweep, refine                       solve_linear (solve/layer.py)
            the quantized stream goes on with the new weights
        commit the block

X is the input of the original model, X~ that of the model whose earlier linears are quantized already.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from leangrid.machine.devices import set_threads
from leangrid.models.streams import Streams
from leangrid.planning.placement import Placement
from leangrid.progress import Event
from leangrid.recipe import Recipe
from leangrid.run.algebra import GroupAlgebra, algebras
from leangrid.run.block import Block
from leangrid.run.open_run import open_run
from leangrid.run.publish import result_of_finished_run
from leangrid.run.ranks import join_ranks
from leangrid.run.request import Request
from leangrid.run.result import QuantizeResult
from leangrid.run.run import Run
from leangrid.solve.layer import solve_linear


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
    max_kl: float | None = None,
    state_dir: str | Path | None = None,
    progress: Callable[[Event], None] | None = None,
    placement: Placement | None = None,
) -> QuantizeResult:
    """Quantize the model in ``source`` into the new directory ``out``.

    Until it is complete the result is called ``out.partial``; the same call again resumes it, to the same bytes.

    Args:
        source: checkpoint directory, hub id ``org/name[@revision]``, or ``.gguf`` file.
        recipe: what to do; ``Recipe()`` where None.
        windows: calibration token ids, int64 [samples, length], instead of the recipe's corpus.
        device: where the blocks are computed, in torch's words.
        threads: CPU threads; torch's own choice where None.
        overwrite: replace ``out`` if it is a result of ours.
        restart: throw away an unfinished run that was started with something else.
        max_rescued: share of the linears that may need a rescue before the exit code becomes 4.
        max_kl: mean KL from the original in nats (1 - cosine for an encoder) above which the exit code becomes 4; where
            None a limit that depends on the bits (gate/quality.py).
        state_dir: where the hidden states between blocks are kept; beside the result where None.
        progress: is called with an Event after every linear and block.
        placement: what is on the device and what waits elsewhere; chosen from the memory there is where None.

    Raises:
        LeangridError: bad input (exit code 2: nothing was written), or a stop (3: the same call resumes).

    Example:
        >>> recipe = leangrid.Recipe(scheme="W4A16_G32", calibration="text.txt", samples=8, length=64)
        >>> result = leangrid.quantize("model", "out-w4", recipe)
        >>> result.layers, result.scheme, result.loss < result.loss_rounding
        (14, 'W4A16_G32', True)
    """
    set_threads(threads)
    recipe, out = Recipe() if recipe is None else recipe, Path(out)
    states = None if state_dir is None else Path(state_dir)
    request = Request(
        source, out, recipe, windows, device, overwrite, restart, max_rescued, max_kl, states, progress, placement
    )
    return carry_out(request)


def carry_out(request: Request) -> QuantizeResult:
    """Open or resume the run that ``request`` asks for, quantize its blocks, and publish the result."""
    with torch.no_grad(), join_ranks(request.device) as (ranks, own_device):
        finished = ranks.broadcast(result_of_finished_run(request) if ranks.first else None)
        if finished is not None:
            return finished
        with open_run(replace(request, device=own_device), ranks) as run:
            streams = run.streams()
            for index in run.remaining_blocks():
                streams = run.attempt(quantize_block, index, streams)
            return run.publish()


def quantize_block(run: Run, index: int, streams: Streams) -> Streams:
    """Quantize block ``index``, commit it, and return the streams that enter the next one."""
    with run.open_block(index, streams) as block:
        for number, group in block.groups(run.stage):
            for algebra in algebras(run, block, number, group):  # one; in a mixture one for each expert
                quantize_linears(run, block, algebra)
        return run.commit(block)


def quantize_linears(run: Run, block: Block, algebra: GroupAlgebra) -> None:
    """Quantize the linears that share one Hessian."""
    hessian = algebra.collect()
    factor = algebra.factorize()
    for name in algebra.names:
        recipe = run.recipe.for_layer(f"{block.name}.{name}")
        for target in algebra.targets(name):
            costs = algebra.costs()
            result = solve_linear(target, factor, hessian.matrix, recipe, run.precision, costs)
            algebra.add(name, result, costs)
    for name, result, costs in algebra.results():
        run.store(block, name, result, costs, hessian, factor)

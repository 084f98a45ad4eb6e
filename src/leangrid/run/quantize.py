"""A checkpoint in, a quantized checkpoint out: LeanQuant's Algorithm 1, block after block.

    for each decoder block                                        quantize_block
        for each group of linears that read the same input
            H = 2/N X~^T X~, G = 2/N X^T X~                       collect      (solve/hessian.py)
            (H + lambda I)^-1 = U^T U                             factorize    (solve/factor.py)
            for each linear
                W~ = W + a W (G - H)(H + lambda I)^-1             targets      (solve/correction.py)
                fit the grid, sweep, refine                       solve_linear (solve/layer.py)
            the quantized stream goes on with the new weights
        tune the block: codes and grids together, if asked for    tune_block   (solve/tuning.py, run/guide.py)
        commit the block                                          (run/block_writer.py)
    tune the grids of the whole model, if asked for               finish_model (run/finishing.py)

X is the input of the original model, X~ that of the model whose earlier linears are quantized already.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from leangrid.models.streams import Streams
from leangrid.planning.placement import Placement
from leangrid.progress import Event
from leangrid.recipe import Recipe
from leangrid.run.algebra import GroupAlgebra, algebras
from leangrid.run.block import Block
from leangrid.run.draw_guide import draw_guide
from leangrid.run.finishing import finish_model
from leangrid.run.open_run import open_run
from leangrid.run.request import Request
from leangrid.run.result import QuantizeResult
from leangrid.run.run import Run
from leangrid.run.tuning import tune_block
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
        out: directory to make; replaced with ``overwrite`` only.
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

    Returns:
        What the run did: sizes, losses, seconds, rescues, and how far the result is from the original.

    Raises:
        LeangridError: bad input (exit code 2: nothing was written), or a stop (3: the same call resumes).

    Example:
        >>> recipe = leangrid.Recipe(scheme="W4A16_G32", calibration="text.txt", samples=8, length=64)
        >>> result = leangrid.quantize("model", "out-w4", recipe)
        >>> result.layers, result.scheme, result.loss < result.loss_rounding
        (14, 'W4A16_G32', True)
    """
    recipe, states = Recipe() if recipe is None else recipe, None if state_dir is None else Path(state_dir)
    others = (overwrite, restart, max_rescued, max_kl, states, progress, placement)
    return run_request(Request(source, Path(out), recipe, windows, device, threads, *others))


def run_request(request: Request) -> QuantizeResult:
    """Open or resume the run that ``request`` asks for, quantize its blocks in order, and publish the result."""
    with torch.no_grad(), open_run(request) as run:
        if isinstance(run, QuantizeResult):  # it was stopped after its directory had got its name
            return run
        run.guide = draw_guide(run)
        streams = run.streams()
        for index in run.remaining_blocks():
            streams = run.onward.advance(index, run.attempt_block(quantize_block, index, streams))
        del streams
        finish_model(run)
        return run.publish()


def quantize_block(run: Run, index: int, streams: Streams) -> Streams:
    """Quantize block ``index``, commit it, and return the streams that enter the next one."""
    with run.open_block(index, streams) as block:
        for number, group in block.groups(run.stage):
            for algebra in algebras(run, block, number, group):  # one; in a mixture one for each expert
                quantize_linears(run, block, algebra)
        return run.writer.commit(block, tune_block(run, block, streams))


def quantize_linears(run: Run, block: Block, algebra: GroupAlgebra) -> None:
    """Quantize the linears that share one Hessian; of several ranks each does a part."""
    if algebra.has_part:
        solve_part(run, block, algebra)
    for solved in algebra.results():
        run.writer.store(block, solved)


def solve_part(run: Run, block: Block, algebra: GroupAlgebra) -> None:
    """Solve this rank's part of the linears that share one Hessian."""
    hessian = algebra.collect()
    factor = algebra.factorize()
    for name in algebra.names:
        recipe = run.recipe.for_layer(block.path(name))
        for target in algebra.targets(name):  # all rows of the linear, or some after others
            observer = algebra.observer()
            algebra.add(name, solve_linear(target, factor, hessian.matrix, recipe, run.precision, observer))

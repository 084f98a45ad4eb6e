"""The hallway: a checkpoint in, a quantized checkpoint out. It reads as the paper's Algorithm 1.

For each decoder block, for each group of linears that share an input: collect the Hessian, factor it once, then for
each linear correct the target, fit the grid, solve, pack; replace; let the activations go on; commit the block."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from leangrid.errors import CalibrationError, RecipeError
from leangrid.machine.devices import out_of_memory, use_threads
from leangrid.models.walk import BlockWalk, ExpertInputs, GroupInputs, Streams
from leangrid.planning.placement import Placement
from leangrid.progress import Event
from leangrid.recipe import Recipe
from leangrid.run.experts import expert_hessians
from leangrid.run.publish import finished_result
from leangrid.run.ranks import joined
from leangrid.run.result import QuantizeResult
from leangrid.run.run import BlockWork, Run
from leangrid.solve.correction import Correction, correct
from leangrid.solve.factor import factorize
from leangrid.solve.hessian import Hessian, HessianSum
from leangrid.solve.in_place import WideGroup, WideSum, stacked
from leangrid.solve.layer import LinearResult, solve_linear

_Sum = TypeVar("_Sum", bound=HessianSum)
_Key = TypeVar("_Key")


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
        max_kl: mean KL from the original (1 - cosine for an encoder) above which the exit code becomes 4; by bits where
        None (gate.py).
        state_dir: where the hidden states between blocks are kept; beside the result where None.
        progress: is called with an Event after every layer and block.
        placement: how the device's memory is used; chosen by the plan's sums where None.

    Raises:
        LeangridError: bad input (nothing was written) or a stop (the same call resumes).
    """
    use_threads(threads)
    recipe = _checked(recipe)
    if windows is not None and not isinstance(windows, Tensor):
        raise CalibrationError(
            f"windows must be a tensor of int64 [samples, length], not {type(windows).__name__}", "windows"
        )
    with joined(device) as (ranks, own_device), torch.no_grad():
        kept = None if state_dir is None else Path(state_dir)
        complete = ranks.from_first(finished_result(Path(out), kept, max_rescued, max_kl) if ranks.first else None)
        if complete is not None:
            return complete
        opened = Run.open(
            source, out, recipe, windows, own_device, overwrite, restart, state_dir, progress, placement, ranks
        )
        with opened as run:
            streams = run.streams()
            for index in run.remaining_blocks():
                streams = quantize_block(run, index, streams)
            return ranks.from_first(run.publish(max_rescued, max_kl) if ranks.first else None)


def _checked(recipe: Recipe | None) -> Recipe:
    """The recipe, validated once more: a copy with other fields (``model_copy``) has passed no door. RecipeError for
    anything else."""
    if recipe is not None and not isinstance(recipe, Recipe):
        raise RecipeError(
            f"a recipe is a leangrid.Recipe, not {type(recipe).__name__}",
            "recipe",
            'Write leangrid.Recipe(scheme="NU4")',
        )
    return Recipe.build() if recipe is None else Recipe.build(**recipe.model_dump())


def quantize_block(run: Run, index: int, streams: Streams) -> Streams:
    """Quantize block ``index``, commit it, and return the streams that enter the next one.

    Where memory runs out, the block begins again with one thing given way (Run.give_way), until nothing is left to.
    """
    while True:
        try:
            run.place(streams)
            return _quantize_block(run, index, streams)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
        run.give_way(index)  # after the except: an error holds on to every tensor of the attempt


def _quantize_block(run: Run, index: int, streams: Streams) -> Streams:
    with run.block(index) as block:
        replay, lean = run.placement.replay, run.placement.lean
        walk = BlockWalk(
            block.module, run.skeleton.groups(index), run.calls, index, streams, replay, lean, run.take, run.keep
        )
        groups = enumerate(walk)
        while True:
            with run.stage("calibrate"):
                number, group = next(groups, (-1, None))
            if group is None:
                break
            if isinstance(group, ExpertInputs):
                solved = _solve_experts(run, block, group, number)
            else:
                solved = (_solve_lean if lean else _solve)(run, block, group, number)
            for name, weight in solved.items():
                walk.replace(name, weight)
            del solved
        run.count_forward(block, walk.flops)
        return run.commit(block, walk.finished())


def _solve(run: Run, block: BlockWork, group: GroupInputs, number: int) -> dict[str, Tensor]:
    """The new weights of a group, as the module stores them; everything else is gone when this returns."""
    total = _summed(run, block, group, number, HessianSum)
    with run.stage("hessian", number):
        hessian = total.finish()
    del total
    return _solve_with(run, block, group.names, number, hessian)


def _solve_experts(run: Run, block: BlockWork, group: ExpertInputs, number: int) -> dict[str, Tensor]:
    """The same expert by expert, each with the Hessian of the tokens that were routed to it."""
    new, cols = {}, run.skeleton.shape(f"{block.name}.{group.names[0]}")[1]
    for names, hessian in expert_hessians(run, group, number, cols):
        new |= _solve_with(run, block, names, number, hessian)
    return new


def _solve_with(run: Run, block: BlockWork, names: Sequence[str], number: int, hessian: Hessian) -> dict[str, Tensor]:
    """Factor, correct, fit, solve and pack the linears ``names``, which share an input with this Hessian."""
    with run.stage("factor", number):
        factor = factorize(hessian.matrix, run.recipe.damping, run.recipe.act_order)
        correction = None
        if hessian.cross is not None and not factor.is_diagonal:
            correction = Correction.of(hessian.matrix, hessian.cross, factor, block.rows(names))
        hessian = replace(hessian, cross=None)
    run.count_group(hessian, block.rows(names), correction is not None)
    solved: dict[str, LinearResult] = {}
    for name in names[run.ranks.rank :: run.ranks.count]:
        with run.stage("factor", number):
            weight = block.weight(name).to(hessian.matrix.device, torch.float32).contiguous()
            target = correct(weight, correction, run.strength)
            del weight
        solved[name] = solve_linear(
            target, factor, hessian.matrix, run.recipe.for_layer(f"{block.name}.{name}"), run.precision
        )
    everyone = {name: result for part in _everyone(run, solved, hessian.matrix.device) for name, result in part.items()}
    return {name: block.keep(name, everyone[name], hessian, factor) for name in names}


def _solve_lean(run: Run, block: BlockWork, group: GroupInputs, number: int) -> dict[str, Tensor]:
    """The same for groups whose matrices hardly fit (wide.py); of each linear every rank solves a part of the rows."""
    total = _summed(run, block, group, number, WideSum)
    with run.stage("factor", number):
        wide = WideGroup(total, {name: block.weight(name) for name in group.names}, run.recipe, run.strength)
    run.count_group(wide.hessian, block.rows(group.names), group.paired)
    new, share = {}, (run.ranks.rank, run.ranks.count)
    for name in group.names:
        tiles = wide.tiles(name, run.precision, recipe=run.recipe.for_layer(f"{block.name}.{name}"), share=share)
        parts = _everyone(run, dict(enumerate(tiles)), wide.hessian.matrix.device)
        result = stacked([tile for part in parts for tile in part.values()])
        del tiles, parts  # their codes are as large as the layer's
        new[name] = block.keep(name, result, wide.hessian, wide.factor)
    return new


def _everyone(run: Run, solved: dict[_Key, LinearResult], device: torch.device) -> list[dict[_Key, LinearResult]]:
    """What each rank solved, on ``device``; between ranks it goes through host memory."""
    if run.ranks.count == 1:
        return [solved]
    parts = run.ranks.all({key: result.to("cpu") for key, result in solved.items()})
    return [{key: result.to(device) for key, result in part.items()} for part in parts]


def _summed(run: Run, block: BlockWork, group: GroupInputs, number: int, kind: type[_Sum]) -> _Sum:
    """H (and, with two streams, G) of the input that the group's linears share, batch by batch as the walk gives
    them."""
    total = kind(
        run.skeleton.shape(f"{block.name}.{group.names[0]}")[1], run.algebra_device(number), cross=group.paired
    )
    pairs = iter(group)
    while True:
        with run.stage("calibrate"):
            original, quantized = next(pairs, (None, None))
        if quantized is None:
            return run.ranks.sum(total)
        with run.stage("hessian", number):
            if original is None:
                total.add(quantized)
            else:
                total.add_pair(original, quantized)
        del original, quantized  # or they would wait for the next batch's pass to end

"""The end of a run where the recipe asks for it (``finish``): the grids of all layers move together, by gradient, until
the whole model's predictions are nearest to the original's. Codes stay.

A block was solved, and perhaps tuned, for its own output. What counts is what the model predicts, so here the error is
KL(original || result) of the next-token distributions over the calibration text; of a model without a language-model
head the relative squared error of its last hidden states. The batches that the Hessians did not see choose the state
that stays, which may be the one before. mlx-lm does the same with affine grids under the name of distilled weight
quantization (DWQ). The model has to fit in memory in its compute dtype, beside its codes and, unless the placement
replays, its weights once more in float32; rank 0 does it alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from leangrid.errors import Interrupted
from leangrid.machine.devices import is_out_of_memory
from leangrid.metrics.divergence import mean_divergence
from leangrid.models.whole import WholeModel, load_whole
from leangrid.planning.gradients import finishes_by_blocks
from leangrid.report.sample import update_sample
from leangrid.run.run import Run
from leangrid.solve.tuning import Steps, TunedLinear, Tuning, relative_error, tune

# Of scales, offsets and levels of 4 bits, in units of their root mean square; at every bit less twice as large, as the
# distance between two levels is (docs/log.md).
_STEP, _STEP_BITS = 0.001, 4


def finish_model(run: Run) -> None:
    """Tune the grids of the whole model, if the recipe says so, and commit what changed.

    Raises:
        Interrupted: out of memory.
    """
    run.flow.close()
    if not run.recipe.finish or not run.ranks.first or run.journal.read_finished_info() is not None:
        return
    seen, held = run.batches_of_all_ranks()
    if not held:
        tuning = Tuning(trouble=f"{len(run.windows)} windows are too few to hold some out")
        return _commit(run, tuning, {})
    _say(run, f"finishing: {run.recipe.finish} passes over {len(seen)} batches of the calibration text")
    by_blocks, instead = finishes_by_blocks(run.states.placement, live=not run.flow.waits), ""
    found = _finished(run, seen, held, by_blocks)
    if found is None and not by_blocks and run.flow.waits:
        instead = "memory ran out: one block's weights at once instead of all"
        _say(run, f"finishing: {instead}")
        found = _finished(run, seen, held, by_blocks=True)
    if found is None:
        way_out = "Finished blocks are kept: free memory, or go on with more of it"
        raise Interrupted("out of memory while the whole model is finished", run.journal.partial, way_out)
    tuning, state = found
    _commit(run, tuning, state if tuning.best else {}, instead)


def _finished(
    run: Run, seen: Sequence[Any], held: Sequence[Any], by_blocks: bool
) -> tuple[Tuning, Mapping[str, tuple[Tensor, Any]]] | None:
    """What was done, and the codes and grid of each linear, by its path in the model; None: memory ran out."""
    numbers = range(len(seen) + len(held))
    fitted, held_out = numbers[: len(seen)], numbers[len(seen) :]
    try:
        with run.stage("finish"), load_whole(run.skeleton, run.whole_device) as model:
            error = _Error(model, [*seen, *held], run.skeleton.has_lm_head, by_blocks)
            steps, watch = Steps(run.recipe.finish or 0, seed=run.recipe.seed), partial(_say_pass, run)
            linears = _tuned_linears(run)
            return tune(linears, error, fitted, held_out, steps, watch=watch, hold=not by_blocks)
    except RuntimeError as failure:
        if not is_out_of_memory(failure):
            raise
        return None


@dataclass
class _Error:
    """The mean error of a batch of ``batches``, with weights of linears by their paths in the model."""

    model: WholeModel
    batches: list[Any]
    has_lm_head: bool
    by_blocks: bool

    def __call__(self, batch: int, weights: Mapping[str, Tensor]) -> Tensor:
        inputs = self.batches[batch]
        with torch.no_grad():
            wanted = self.model(inputs)
        run = self.model.with_weights_by_blocks if self.by_blocks else self.model.with_weights
        given = run(weights, inputs)
        return mean_divergence(wanted, given) if self.has_lm_head else relative_error(given, wanted)


def _tuned_linears(run: Run) -> dict[str, TunedLinear]:
    """Every quantized linear as it is committed, by its path in the model."""
    found = {}
    for index in range(len(run.skeleton.blocks)):
        for name, codes, grid in run.weights.solved(index):
            recipe = run.recipe.for_layer(run.skeleton.linear_name(index, name))
            precision = run.precision.for_scheme(recipe.scheme_for(codes.shape[1]))
            device, steps = run.whole_device, Steps(run.recipe.finish or 0, _STEP * 2.0 ** (_STEP_BITS - grid.bits))
            path = f"{run.skeleton.block_name(index)}.{name}"
            found[path] = TunedLinear(codes.to(device), grid.to(device), None, precision, steps)
    return found


def _commit(run: Run, tuning: Tuning, state: Mapping[str, tuple[Tensor, Any]], instead: str = "") -> None:
    """Store the tensors that changed, and what was done; ``instead``: what was done otherwise for lack of memory."""
    changed: dict[str, Tensor] = {}
    samples: dict[str, Any] = {}
    with run.stage("save"):
        for index in range(len(run.skeleton.blocks) if state else 0):
            block = run.skeleton.block_name(index)
            found = {name: state[f"{block}.{name}"] for group in run.skeleton.groups(index) for name in group}
            own = {name: (codes.cpu(), grid.to("cpu")) for name, (codes, grid) in found.items()}
            changed |= run.weights.differing(index, own)
            sample = run.journal.read_block_info(index)["sample"]
            if sample is not None:
                name = next(name for name in own if run.skeleton.linear_name(index, name) == sample["name"])
                samples[str(index)] = update_sample(sample, *own[name])
        measure = "kl" if run.skeleton.has_lm_head else "relative squared error"
        info = {"tuning": tuning.to_json(), "measure": measure, "samples": samples}
        info |= {"memory": instead} if instead else {}
        run.journal.commit_finished(changed, info)
    if not tuning.best:
        _say(run, f"the model is not finished: {tuning.trouble or 'its error on held-out windows did not fall'}")


def _say_pass(run: Run, turn: int, held: float) -> None:
    _say(run, f"finishing: after pass {turn} of {run.recipe.finish} the error on held-out windows is {held:.4g}")


def _say(run: Run, message: str) -> None:
    run.progress.report("notice", len(run.skeleton.blocks), message=message)

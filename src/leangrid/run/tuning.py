"""Block tuning in a run (solve/tuning.py): between the last linear that is solved and the commit.

Both streams are there: the block is to give on the quantized stream what the original block gives on the original one.
Every batch is one window, or several short ones. The last of them are held out: they go along in both streams, but no
Hessian sums them and no step is taken by them; they choose the state that stays. A block that does not get better on
them stays as it was solved, and the journal says so."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from leangrid.models.linears import rows_first
from leangrid.models.streams import Streams
from leangrid.run.block import Block
from leangrid.run.guide import Guide
from leangrid.run.repeated import RepeatedWalk
from leangrid.run.run import Run
from leangrid.solve.tuning import Steps, TunedLinear, Tuning, relative_error, tune


def tune_block(run: Run, block: Block, entered: Streams) -> Streams:
    """Tune the linears of ``block``, if the recipe says so, and return the streams that leave it.

    Args:
        entered: the streams that entered it.
    """
    left = block.walk.finished()
    if not run.recipe.tune or not block.solved:
        return left
    reason = _reason_against(run, block)
    if reason or left.original is None:
        return _untuned(run, block, Tuning(trouble=reason), left)
    output = _Output(run, block, entered.quantized, left.original)
    fitted = len(entered.quantized) - run.held_out
    steps = Steps(run.recipe.tune, seed=run.recipe.seed)
    with run.stage("tune"):
        linears = {name: _tuned_linear(run, block, name, steps) for name in block.solved}
        batches = range(len(entered.quantized))
        if run.guide is not None:
            weights = {name: one.weight() for name, one in linears.items()}
            output.follow(run.guide, weights, batches[: run.held_out])
            del weights
        together = run.ranks.add if run.ranks.count > 1 else None
        block.tuning, state = tune(linears, output.error, batches[:fitted], batches[fitted:], steps, together)
        del linears
    if not block.tuning.best:
        return _untuned(run, block, block.tuning, left)
    weights = {}
    for name, (codes, grid) in state.items():
        solved = block.solved[name]
        result = replace(solved.result, codes=codes, grid=grid)
        weights[name] = run.writer.replace(block, replace(solved, result=result))
    with run.stage("calibrate"):
        quantized = [output.leave(batch, weights) for batch in batches]
    return Streams(quantized, left.original)


def _untuned(run: Run, block: Block, tuning: Tuning, left: Streams) -> Streams:
    """The streams that ``left`` the block as it was solved; what kept it so is said and goes to the journal."""
    block.tuning = tuning
    why = tuning.trouble or "its error on held-out windows did not fall"
    run.progress.report("notice", block.index, message=f"{block.name} is not tuned: {why}")
    return left


def _reason_against(run: Run, block: Block) -> str:
    """Why the block cannot be tuned, as a sentence; "" where it can."""
    if not run.held_out:
        each = f" for {run.ranks.count} ranks" if run.ranks.count > 1 else ""
        return f"{len(run.windows)} windows{each} are too few to hold some out"
    if isinstance(block.walk, RepeatedWalk):
        return "the model calls the block more than once"
    if not run.flow.waits and run.skeleton.structure.blocks[block.index].changes:
        return "the block changes what it is called with"
    return ""


def _tuned_linear(run: Run, block: Block, name: str, steps: Steps) -> TunedLinear:
    result = block.solved[name].result
    scheme = run.recipe.for_layer(block.path(name)).scheme_for(result.codes.shape[1])
    precision, target = run.precision.for_scheme(scheme), block.originals[name].float()
    device = target.device
    return TunedLinear(result.codes.to(device), result.grid.to(device), target, precision, steps)


class _Output:
    """The block's output on the quantized stream, and how far it is from the original's on the original stream."""

    def __init__(self, run: Run, block: Block, entered: list[Tensor], wanted: list[Tensor]) -> None:
        self._run, self._block, self._entered, self._wanted = run, block, entered, wanted
        self._device = next(block.module.parameters()).device
        self._guide: Guide | None = None
        self._felt = 1.0  # the unit in which the guide's share of the error is counted

    def leave(self, batch: int, weights: Mapping[str, Tensor]) -> Tensor:
        """Let a batch of the quantized stream leave the block with ``weights``; the states, where they wait."""
        left = self._call(batch, weights, trial=False)
        return self._run.states.put(left) if self._run.flow.waits else left

    def _call(self, batch: int, weights: Mapping[str, Tensor], trial: bool) -> Tensor:
        """The output [windows, length, hidden] of a batch with ``weights`` [rows, cols] of linears by name."""
        module, named = self._block.module, {}
        for name, weight in weights.items():
            linear = module.get_submodule(name)
            named[f"{name}.weight"] = rows_first(linear, weight).to(linear.get_parameter("weight").dtype)

        def block(*args: Any, **kwargs: Any) -> Any:
            return functional_call(module, named, args, kwargs)

        hidden = self._entered[batch]
        if self._run.flow.waits:  # else the flow gets it itself
            hidden = self._run.states.get(hidden, self._device)
        return self._run.flow.call("quantized", batch, self._block.index, block, hidden, trial)

    def error(self, batch: int, weights: Mapping[str, Tensor]) -> Tensor:
        """How far the block's output on a batch is from what is wanted, with ``weights`` of its linears."""
        given, wanted = self._outputs(batch, weights)
        own = relative_error(given, wanted)
        if self._guide is None:
            return own
        return (own + self._felt * self._feel(self._guide, batch, given, wanted)) / 2

    def follow(self, guide: Guide, weights: Mapping[str, Tensor], batches: Sequence[int]) -> None:
        """Let half of the error be what the predictions feel of the output, by ``guide``: with ``weights`` over
        ``batches`` of all ranks as much as that of the output itself. Where they feel nothing, the error stays that."""
        total = torch.zeros(2, dtype=torch.float64)
        for batch in batches:
            given, wanted = self._outputs(batch, weights)
            shares = relative_error(given, wanted), self._feel(guide, batch, given, wanted)
            total += torch.stack(shares).double().cpu()
        self._run.ranks.add([total])
        own, felt = total.tolist()
        if 0 < felt < math.inf and 0 < own < math.inf:
            self._guide, self._felt = guide, own / felt

    def _outputs(self, batch: int, weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What leaves the block on a batch with ``weights`` of its linears, and what should."""
        wanted = self._run.states.get(self._wanted[batch], self._device)
        return self._call(batch, weights, trial=True), wanted

    def _feel(self, guide: Guide, batch: int, given: Tensor, wanted: Tensor) -> Tensor:
        """How much the predictions feel of the difference."""
        first = sum(len(hidden) for hidden in self._entered[:batch])
        return guide.felt(self._block.index, batch, first, given.float() - wanted.float())

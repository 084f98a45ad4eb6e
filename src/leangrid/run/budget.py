"""A budget is spent before the run: a measuring pass over the original model, then the exact choice.

Of every linear the loss that each candidate scheme leaves is measured on the original's inputs, with one Hessian and
factor for all (solve/trial.py); of every unit the distance from the original of the model in which this unit alone is
rounded (probes.py). Where errors are small, distances grow as losses do, so a unit's distance at another scheme is

    distance of rounding * loss of the solver at that scheme / loss of rounding

and they add up over units. The knapsack of solve/knapsack.py takes the least sum. The losses of each block go to the
journal: a pass that was stopped goes on with what only forward passes have to make again."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from leangrid.data.windows import Windows
from leangrid.errors import Interrupted, NumericalError, ResumeError
from leangrid.machine.devices import DeviceClock, parse_device
from leangrid.machine.stopwatch import Clock
from leangrid.models.flow import LiveFlow
from leangrid.models.groups import ExpertInputs
from leangrid.models.model_inputs import Inputs
from leangrid.models.streams import Streams
from leangrid.planning.budget import EXPERTS, PROBED_LENGTH, Budget, asked, count_measured, count_probed, without_budget
from leangrid.progress import Event
from leangrid.run.algebra import algebras
from leangrid.run.block import Block
from leangrid.run.inputs import RunInputs
from leangrid.run.open_on_ranks import ReadOnlyJournal
from leangrid.run.probes import Probes
from leangrid.run.ranks import Ranks
from leangrid.run.run import Run
from leangrid.solve.trial import trial_losses

_WIDTHS = "widths"  # the artifact of the journal
_REFERENCE_BITS = 4  # a unit is rounded to about so many bits: the error is small, and larger than that of bfloat16


def choose_widths(inputs: RunInputs, windows: Windows, clock: Clock, ranks: Ranks) -> None:
    """Replace the recipe of ``inputs``, which has a budget, by the one that spends it best, the same on every rank.

    Raises:
        ResumeError: blocks are committed, but what was chosen for them is lost.
        NumericalError: a distance is not finite.
        Interrupted: out of memory.
    """
    budget = Budget.of(inputs.skeleton, inputs.recipe)
    found = inputs.journal.load_artifact(_WIDTHS) if ranks.first else None
    found = ranks.broadcast(found)
    if found is None and inputs.journal.count_committed():
        what = "the widths that were chosen for the finished blocks are lost"
        raise ResumeError(what, inputs.journal.partial, "--restart discards the unfinished run")
    if found is None:
        with clock.stage("measure"):
            found = _Measuring(inputs, budget, windows, ranks).measured()
            expected = found["distance"][:, None] * found["ratio"]
            if not bool(expected.isfinite().all()):
                unit = budget.units[int((~expected.isfinite()).any(1).nonzero()[0])]
                what = "the distance from the original with this layer alone quantized is not finite"
                raise NumericalError(what, unit.names[0], "Use a scheme for all layers")
            found["choice"] = torch.tensor(budget.choose(expected.tolist()))
        if ranks.first:
            inputs.journal.save_artifact(_WIDTHS, found)
    choice = found["choice"].tolist()
    inputs.recipe, inputs.budget = budget.chosen(choice), _account(inputs, budget, found, choice)
    if ranks.first and inputs.request.progress is not None:
        words = ", ".join(f"{count} linears {name}" for name, count in budget.widths(choice).items())
        inputs.request.progress(Event("notice", message=f"chosen within the budget: {words}"))


def _account(inputs: RunInputs, budget: Budget, found: Mapping[str, Tensor], choice: list[int]) -> dict[str, Any]:
    """What the manifest says: the budget, what was measured, and what was chosen."""
    expected = (found["distance"][:, None] * found["ratio"]).tolist()
    units = [
        {
            "linears": list(unit.names) if not unit.experts else [unit.names[0], f"and {len(unit.names) - 1} more"],
            "scheme": budget.candidates[chosen].name,
            "rounded_to": budget.candidates[reference].name,
            "distance": float(f"{distance:.6g}"),
            "expected": {one.name: float(f"{e:.6g}") for one, e in zip(budget.candidates, each, strict=True)},
        }
        for unit, chosen, reference, distance, each in zip(
            budget.units, choice, found["reference"].tolist(), found["distance"].tolist(), expected, strict=True
        )
    ]
    total = sum(each[chosen] for each, chosen in zip(expected, choice, strict=True))
    return {
        **asked(budget.recipe),
        "measure": "kl" if inputs.skeleton.has_lm_head else "squared error",
        "expected": float(f"{total:.6g}"),
        "widths": budget.widths(choice),
        "tokens": {"losses": int(found["tokens"][0]), "distances": int(found["tokens"][1])},
        "units": units,
    }


class _MeasuringRun(Run):
    """A run over the original model that changes no weight and commits no block."""

    def _reduce(self, index: int) -> None:
        if isinstance(self.flow, LiveFlow):  # its passes cannot begin again in the middle of the model
            what = "out of memory while widths are measured"
            raise Interrupted(what, self.skeleton.block_name(index), "Free memory, or use fewer --samples")
        super()._reduce(index)


@dataclass(frozen=True, eq=False)
class _Losses:
    """Of some units the losses [units, candidates]: the solver's, and rounding's."""

    solved: Tensor
    rounded: Tensor


class _Measuring:
    """The pass over all blocks."""

    def __init__(self, inputs: RunInputs, budget: Budget, windows: Windows, ranks: Ranks) -> None:
        self._inputs, self._budget, self._ranks = inputs, budget, ranks
        recipe, (samples, length) = inputs.recipe, windows.shape
        count = max(count_measured(inputs.skeleton, samples, length), ranks.count)
        probed = count_probed(inputs.skeleton, budget, samples, length, count)
        self._windows = windows[:count]
        self._probed: Windows = windows[: max(probed, ranks.count)]
        if isinstance(self._probed, Tensor):
            self._probed = self._probed[:, :PROBED_LENGTH]
        plain = without_budget(recipe).model_copy(
            update={"correct": 0.0, "refine": 0, "tune": 0, "guide": 0, "finish": 0}
        )
        self._recipes = [plain.model_copy(update={"scheme": one.name}) for one in budget.candidates]
        journal = ReadOnlyJournal(inputs.journal.partial, inputs.request.state_dir, 0)
        journal.keeps_states = inputs.journal.keeps_states
        request = replace(inputs.request, progress=None)
        self._own = replace(inputs, request=request, recipe=plain, journal=journal)
        order = sorted(range(len(budget.candidates)), key=lambda n: abs(budget.candidates[n].bits - _REFERENCE_BITS))
        self._order = order  # in which references are tried: one at which rounding makes an error

    def measured(self) -> dict[str, Tensor]:
        """Of each unit ``distance`` [units], at the candidate ``reference`` [units], and by how much it grows at each
        candidate, ``ratio`` [units, candidates]; and the ``tokens`` [2] of losses and distances."""
        run = _MeasuringRun(
            self._own, self._windows, DeviceClock(parse_device(self._inputs.request.device)), self._ranks
        )
        probes: Probes | None = None
        try:
            streams = run.streams()
            probes = Probes(run, self._budget.units, self._batches())
            losses: list[_Losses] = []
            for index in range(len(run.skeleton.blocks)):
                streams = run.attempt_block(partial(self._block, probes, losses), index, streams)
                streams = run.onward.advance(index, streams)
                self._say(index)
            sums, tokens = probes.distances()
        finally:
            if probes is not None:
                probes.close()
            run.close()
        everyone = self._ranks.gather((sums, tokens))
        tokens = sum(each[1] for each in everyone)
        distance = torch.tensor([sum(each) / tokens for each in zip(*(each[0] for each in everyone), strict=True)],
                                dtype=torch.float64)  # fmt: skip
        solved, rounded = (torch.cat([getattr(one, kind) for one in losses]) for kind in ("solved", "rounded"))
        reference = torch.tensor([self._reference(each) for each in rounded])
        by = rounded.gather(1, reference[:, None])
        ratio = torch.where(by == 0, torch.zeros_like(solved), solved / by)  # no error at any scheme: nothing to lose
        counted = torch.tensor([self._windows.numel(), tokens])
        return {"distance": distance, "reference": reference, "ratio": ratio, "tokens": counted}

    def _batches(self) -> list[Inputs]:
        """This rank's windows for the distances, one a batch."""
        return list(self._ranks.share(self._probed).split(1))

    def _block(self, probes: Probes, losses: list[_Losses], run: Run, index: int, streams: Streams) -> Streams:
        """Measure block ``index``, and let everything go through it."""
        numbers = [number for number, unit in enumerate(self._budget.units) if unit.block == index]
        with run.open_block(index, streams) as block:
            kept = self._ranks.broadcast(
                self._inputs.journal.load_artifact(_artifact(index)) if self._ranks.first else None
            )
            if kept is None:
                by_name = self._losses(run, block)
                streams = block.walk.finished()
                units = [[by_name[path] for path in self._budget.units[number].paths if path in by_name]
                         for number in numbers]  # fmt: skip
                table = (
                    torch.stack([sum(each[1:], each[0]) for each in units])
                    if units
                    else torch.zeros(0, len(self._recipes), 2)
                )
                kept = {"losses": table.double()}
                if self._ranks.first:
                    self._inputs.journal.save_artifact(_artifact(index), kept)
            else:
                streams = _through(run, block, streams)
            found = _Losses(kept["losses"][..., 0], kept["losses"][..., 1])
            rounding = {
                number: self._recipes[self._reference(each)]
                for number, each in zip(numbers, found.rounded, strict=True)
            }
            probes.through(index, block.module, rounding)
        del losses[index:]
        losses.append(found)
        return streams

    def _losses(self, run: Run, block: Block) -> dict[str, Tensor]:
        """The losses [candidates, 2] of the block's linears by their paths, over all ranks; of many experts those of
        some, which stand for all."""
        mine: dict[str, Tensor] = {}
        for number, group in block.groups(run.stage):
            share, tried = 1.0, group
            if isinstance(group, ExpertInputs):
                tried = self._some_experts(group)
                share = len(group.experts) / len(tried.experts)
            for algebra in algebras(run, block, number, tried):
                if not algebra.has_part:
                    continue
                hessian = algebra.collect()
                factor = algebra.factorize()
                for name in algebra.names:
                    for target in algebra.targets(name):
                        each = trial_losses(target, factor, hessian.matrix, self._recipes, run.precision)
                        mine[name] = mine.get(name, torch.zeros_like(each)) + share * each
        found: dict[str, Tensor] = {}
        for theirs in self._ranks.gather(mine):
            for name, each in theirs.items():
                found[name] = found.get(name, torch.zeros_like(each)) + each
        return found

    def _some_experts(self, group: ExpertInputs) -> ExpertInputs:
        """A few of the experts that saw tokens, evenly spaced."""
        counts = torch.zeros(len(group.experts), dtype=torch.int64)
        for inputs in group:
            counts += torch.tensor([len(x) for x in inputs])
        counts = sum(self._ranks.gather(counts), torch.zeros_like(counts))
        seen = counts.nonzero().squeeze(1).tolist() or list(range(len(group.experts)))
        step = max(1, len(seen) // EXPERTS)
        some = seen[::step][:EXPERTS]
        experts = tuple(group.experts[expert] for expert in some)

        def read() -> Iterator[tuple[int, Any, Any]]:
            return ((batch, None, [inputs[expert] for expert in some]) for batch, inputs in enumerate(group))

        return ExpertInputs(tuple(name for names in experts for name in names), experts, read)

    def _reference(self, rounded: Tensor) -> int:
        """The candidate to which a unit is rounded, by the losses of rounding [candidates]."""
        return next((number for number in self._order if float(rounded[number]) > 0), self._order[0])

    def _say(self, index: int) -> None:
        progress, blocks = self._inputs.request.progress, len(self._inputs.skeleton.blocks)
        if progress is not None and self._ranks.first and (index + 1) * 10 // blocks > index * 10 // blocks:
            message = f"measured what widths cost in {index + 1} of {blocks} blocks"
            progress(Event("calibrate", message=message))


def _artifact(index: int) -> str:
    return f"losses_{index:04d}"


def _through(run: Run, block: Block, streams: Streams) -> Streams:
    """The original stream through a block whose losses are known already."""
    device, left = torch.device(run.device), []
    for batch, hidden in enumerate(streams.quantized):
        entered = run.states.get(hidden, device) if run.flow.waits else hidden
        out = run.flow.call("quantized", batch, block.index, block.module, entered)
        left.append(run.states.put(out) if run.flow.waits else out)
    return Streams(left, None)

"""The Hessians of a mixture's experts: each from the tokens routed to it, and what an expert with few tokens takes
instead.

An expert that saw fewer tokens than its linears have columns has a Hessian without full rank: directions it was never
shown would cost nothing. Its own sum is blended with the prior, the Hessian of what all experts of the stage read (for
gate and up that is the block's input, every token counted as often as it is routed; for down the mean over the experts
by tokens), in proportion to the tokens it has: n of cols. An expert without tokens takes the prior alone. Both are
recorded.

Of several ranks each sums the tokens of its own windows, for every expert. As many experts as there are ranks are then
solved at the same time: the sums of each go to the rank that solves it."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from leangrid.errors import CalibrationError
from leangrid.models.walk import ExpertInputs
from leangrid.planning.groups import EXPERT_SUMS
from leangrid.run.run import Run
from leangrid.solve.hessian import Hessian, HessianSum
from leangrid.solve.rescue import Rescue

CHUNK_BYTES = EXPERT_SUMS  # of sums that are made at once; a replayed pass is repeated for each chunk


@dataclass(frozen=True, eq=False)
class ExpertRound:
    """Experts that are solved at the same time, the i-th by rank i.

    Attributes:
        names: the linears of each.
        hessian: of this rank's expert, over the tokens of all ranks; None where there are fewer experts than ranks, and
            none for this one.
    """

    names: tuple[tuple[str, ...], ...]
    hessian: Hessian | None


def expert_rounds(run: Run, group: ExpertInputs, number: int, cols: int) -> Iterator[ExpertRound]:
    """All experts, in order, as many at a time as there are ranks; the sums of one chunk of them are in memory.

    Raises:
        CalibrationError: no expert saw a token.
    """
    device = run.states.algebra_device(number)
    counts = _counts(run, group)
    ranks, prior = run.ranks, None
    if min(counts) < cols:
        total = _summed(run, group, number, cols, device, [range(len(counts))])[0]
        prior = ranks.sum_hessians(total).finish()
    chunk = max(1, CHUNK_BYTES // (4 * cols**2))
    chunk = chunk // ranks.count * ranks.count or chunk  # whole rounds
    for start in range(0, len(counts), chunk):
        experts = range(start, min(start + chunk, len(counts)))
        sums = _summed(run, group, number, cols, device, [range(e, e + 1) for e in experts])
        for first in range(0, len(experts), ranks.count):
            solved, hessian = experts[first : first + ranks.count], None
            own = ranks.sum_for_owners(sums[first : first + ranks.count])
            if own is not None:
                with run.stage("hessian", number):
                    hessian = blend_with_prior(own, prior, f"expert {solved[ranks.rank]}")
            yield ExpertRound(tuple(group.experts[expert] for expert in solved), hessian)


def blend_with_prior(own: HessianSum, prior: Hessian | None, name: str) -> Hessian:
    """The Hessian of an expert's ``own`` sums; with fewer tokens than columns together with ``prior``, and recorded."""
    if prior is None or own.tokens >= own.cols:
        return own.finish()
    if not own.tokens:
        note = Rescue("unseen_expert", f"{name} saw none of {prior.tokens} routed tokens: the shared prior alone", 0)
        return replace(prior, tokens=0, dropped=own.dropped, blended=(note,))
    mine, share = own.finish(), own.tokens / own.cols
    note = Rescue(
        "starved_expert",
        f"{name} saw {own.tokens} tokens for {own.cols} columns: {1 - share:.0%} shared prior",
        own.tokens,
    )
    return replace(mine, matrix=mine.matrix * share + prior.matrix * (1 - share), blended=(note,))


def _counts(run: Run, group: ExpertInputs) -> list[int]:
    """Tokens of all ranks that are routed to each expert."""
    with run.stage("calibrate"):
        counts = [0] * len(group.experts)
        for inputs in group:
            counts = [count + len(x) for count, x in zip(counts, inputs, strict=True)]
    counts = [sum(each) for each in zip(*run.ranks.gather(counts), strict=True)]
    if not any(counts):
        raise CalibrationError(
            "the experts saw no calibration tokens", group.names[0], "Use more or other calibration text"
        )
    return counts


def _summed(
    run: Run, group: ExpertInputs, number: int, cols: int, device: torch.device, parts: list[range]
) -> list[HessianSum]:
    """One sum for each of ``parts``, over the tokens of those experts."""
    sums = [HessianSum(cols, device) for _ in parts]
    batches = iter(group)
    while True:
        with run.stage("calibrate"):
            inputs = next(batches, None)
        if inputs is None:
            return sums
        with run.stage("hessian", number):
            for total, experts in zip(sums, parts, strict=True):
                for expert in experts:
                    if len(inputs[expert]):
                        total.add(inputs[expert])

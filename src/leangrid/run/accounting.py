"""What a run's figures say of its work: seconds of a layer's stages, and floating-point operations by stage."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter

import torch

from leangrid import kernels
from leangrid.machine import flops
from leangrid.machine.devices import synchronize
from leangrid.machine.stopwatch import Clock
from leangrid.models.skeleton import Skeleton
from leangrid.recipe import Recipe
from leangrid.solve.factor import FactorSummary
from leangrid.solve.hessian import Hessian
from leangrid.solve.layer import LinearResult


class LayerCosts:
    """Watches one ``solve_linear``: seconds and operations of its stages grid, solve, refine and baseline.

    A device works on while Python goes ahead, so a stage ends when the device has done its work.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(("grid", "solve", "refine", "baseline"), 0.0)
        self.flops: dict[str, float] = dict.fromkeys(("solve", "refine", "baseline"), 0.0)
        self._device = device

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the seconds of the body to stage ``name``."""
        synchronize(self._device)
        begin = perf_counter()
        yield
        synchronize(self._device)
        self.seconds[name] += perf_counter() - begin

    def record_sweep(self, stage: str, rows: int, cols: int, exact: bool) -> None:
        """Add the operations of a sweep to ``stage``."""
        self.flops[stage] += flops.exact(rows, cols) if exact else flops.sweep(rows, cols)

    def record_loss(self, stage: str, rows: int, cols: int) -> None:
        """Add the operations of a layer loss to ``stage``."""
        self.flops[stage] += flops.layer_loss(rows, cols)

    def record_refinement(self, stage: str, rows: int, cols: int, rounds: int) -> None:
        """Add the operations of a refinement to ``stage``."""
        self.flops[stage] += flops.refine(rows, cols, rounds)

    def add(self, other: "LayerCosts") -> None:
        """Add what another part of the same layer cost."""
        for mine, theirs in ((self.seconds, other.seconds), (self.flops, other.flops)):
            for name, value in theirs.items():
                mine[name] += value


@dataclass(frozen=True, eq=False)
class SolvedLinear:
    """A linear of a block, whole: its path from the block, the result, what it was solved with, what it cost on all
    ranks, and the share of its inputs' own error that was corrected."""

    name: str
    result: LinearResult
    factor: FactorSummary
    costs: LayerCosts
    share: float = 0.0


class Accounting:
    """Adds a run's operations to its clock: what the recipe needs at least, and what was done."""

    def __init__(self, clock: Clock, skeleton: Skeleton, recipe: Recipe, tokens: int) -> None:
        self._clock, self._skeleton, self._recipe, self._tokens = clock, skeleton, recipe, tokens
        self._streams = recipe.streams

    def count_forward(self, index: int, done: float) -> None:
        """Block ``index`` was walked with ``done`` operations; needed is each linear once for a token and stream."""
        weights = sum(math.prod(self._skeleton.shape(name)) for name in self._skeleton.linear_names(index))
        self._clock.flops.add("calibrate", self._streams * flops.product(weights, 1, self._tokens), done)

    def count_group(self, hessian: Hessian, rows: int, corrected: bool) -> None:
        """The sums of a Hessian were made, it was factored, and the target of ``rows`` rows was corrected or not."""
        cols, streams, counts = len(hessian.matrix), self._streams, self._clock.flops
        block = min(kernels.outer_block(hessian.matrix.device), cols)
        sums = [flops.hessian(hessian.tokens, cols, streams), flops.hessian(hessian.tokens, cols, streams, block)]
        counts.add("hessian", *sums)
        measured = self._recipe.measures_correction
        moved = [flops.correction(rows, cols, done, measured) if corrected else 0.0 for done in (False, True)]
        halves = not hessian.matrix.is_cuda
        counts.add("factor", flops.factor(cols, False) + moved[0], flops.factor(cols, True, halves) + moved[1])

    def count_layer(self, shape: Sequence[int], costs: LayerCosts) -> None:
        """A linear of ``shape`` was solved."""
        scheme, (rows, cols) = self._recipe.parsed, shape
        sweep = flops.exact(rows, cols) if scheme.exact else flops.sweep(rows, cols)
        needed = 0.0 if scheme.method == "rtn" else sweep + flops.refine(rows, cols, self._recipe.refine or 0)
        self._clock.flops.add("solve", needed, costs.flops["solve"] + costs.flops["refine"])
        self._clock.flops.add("baseline", 0.0, costs.flops["baseline"])
        for stage, seconds in costs.seconds.items():
            self._clock.add("solve" if stage == "refine" else stage, seconds)

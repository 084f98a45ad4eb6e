"""What has to be known before the linears that share a Hessian can be solved, and who solves which of them.

Each kind has the same steps: ``collect`` the Hessian, ``factorize`` it, give the corrected ``targets`` of one linear
after another, take what was solved by ``add``, and hand all of it out by ``results``.

* GroupAlgebra: the linears of a group read the same input. Of several ranks each solves some of the linears whole.
* ExpertAlgebra: the linears of one expert; its Hessian is made from the tokens that were routed to it (experts.py).
* InPlaceAlgebra: the same results where the group's matrices hardly fit (solve/in_place.py). Targets come a tile of
  rows at a time, and of several ranks each solves a part of the rows of every linear.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from leangrid.models.walk import ExpertInputs, GroupInputs
from leangrid.run.accounting import LayerCosts
from leangrid.run.block import Block
from leangrid.run.experts import expert_hessians
from leangrid.run.run import Run
from leangrid.solve.correction import Correction, correct
from leangrid.solve.factor import Factor, factorize
from leangrid.solve.hessian import Hessian, HessianSum
from leangrid.solve.in_place import InPlaceGroup, InPlaceHessianSum, concatenate_results
from leangrid.solve.layer import LinearResult

_Sum = TypeVar("_Sum", bound=HessianSum)


def algebras(run: Run, block: Block, number: int, group: GroupInputs | ExpertInputs) -> "Iterator[GroupAlgebra]":
    """One for each Hessian that the group needs: a single one, or one an expert."""
    if isinstance(group, ExpertInputs):
        cols = run.skeleton.shape(f"{block.name}.{group.names[0]}")[1]
        for names, hessian in expert_hessians(run, group, number, cols):
            yield ExpertAlgebra(run, block, number, names, hessian)
    elif run.states.placement.in_place:
        yield InPlaceAlgebra(run, block, number, group)
    else:
        yield PlainAlgebra(run, block, number, group)


class GroupAlgebra:
    """The steps that all kinds share: what was solved is collected here, and exchanged between ranks.

    Attributes:
        names: the linears, as paths from the block.
    """

    def __init__(self, run: Run, block: Block, number: int, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._run, self._block, self._number = run, block, number
        self._device = run.states.algebra_device(number)
        self._solved: dict[str, list[tuple[LinearResult, LayerCosts]]] = {name: [] for name in names}

    def collect(self) -> Hessian:
        """H of the input, over the calibration tokens of all ranks."""
        raise NotImplementedError

    def factorize(self) -> Factor:
        """U with (H + lambda I)^-1 = U^T U; the correction is made from it."""
        raise NotImplementedError

    def targets(self, name: str) -> Iterator[Tensor]:
        """W~ of this rank's part of a linear, float32 [rows, cols], some rows after others."""
        raise NotImplementedError

    def costs(self) -> LayerCosts:
        """The observer for one ``solve_linear``."""
        return LayerCosts(self._device)

    def add(self, name: str, result: LinearResult, costs: LayerCosts) -> None:
        """Take what was solved for the next rows of ``name``."""
        self._solved[name].append((result, costs))

    def results(self) -> Iterator[tuple[str, LinearResult, LayerCosts]]:
        """Each linear whole, with what it cost on all ranks."""
        parts = [self._solved]
        if self._run.ranks.count > 1:  # between ranks everything goes through host memory
            for solved in self._solved.values():
                solved[:] = [(result.to("cpu"), costs) for result, costs in solved]
            parts = self._run.ranks.gather(self._solved)
        for name in self.names:
            yield name, *self._joined([piece for part in parts for piece in part.pop(name)])

    def _joined(self, pieces: list[tuple[LinearResult, LayerCosts]]) -> tuple[LinearResult, LayerCosts]:
        costs = pieces[0][1]
        for _, other in pieces[1:]:
            costs.add(other)
        return concatenate_results([result.to(self._device) for result, _ in pieces]), costs

    def _rows(self) -> int:
        """Output features of all the linears together."""
        return sum(self._run.skeleton.shape(path)[0] for path in self._block.paths(self.names))


class PlainAlgebra(GroupAlgebra):
    """Of one group; H, G, the factor and the correction are on the device together."""

    def __init__(self, run: Run, block: Block, number: int, group: GroupInputs) -> None:
        super().__init__(run, block, number, group.names)
        self._group = group
        self._hessian: Hessian | None = None
        self._correction: Correction | None = None

    def collect(self) -> Hessian:
        cols = self._run.skeleton.shape(f"{self._block.name}.{self.names[0]}")[1]
        total = HessianSum(cols, self._device, cross=self._group.paired)
        total = _sum_tokens(self._run, self._number, self._group, total)
        with self._run.stage("hessian", self._number):
            self._hessian = total.finish()
        return replace(self._hessian, cross=None)

    def factorize(self) -> Factor:
        hessian, self._hessian, recipe = self._hessian, None, self._run.recipe
        if hessian is None:
            raise RuntimeError("collect comes before factorize")
        with self._run.stage("factor", self._number):
            factor = factorize(hessian.matrix, recipe.damping, recipe.act_order)
            if hessian.cross is not None and not factor.is_diagonal:
                self._correction = Correction.of(hessian.matrix, hessian.cross, factor, self._rows())
        self._run.accounting.count_group(hessian, self._rows(), self._correction is not None)
        return factor

    def targets(self, name: str) -> Iterator[Tensor]:
        ranks = self._run.ranks
        if self.names.index(name) % ranks.count != ranks.rank:
            return
        with self._run.stage("factor", self._number):
            weight = self._run.weight(self._block, name).to(self._device, torch.float32).contiguous()
            target = correct(weight, self._correction, self._run.strength)
            del weight
        yield target


class ExpertAlgebra(PlainAlgebra):
    """Of one expert, whose Hessian was summed with those of the others. Its input is not corrected."""

    def __init__(self, run: Run, block: Block, number: int, names: Sequence[str], hessian: Hessian) -> None:
        GroupAlgebra.__init__(self, run, block, number, names)
        self._hessian, self._correction = hessian, None

    def collect(self) -> Hessian:
        if self._hessian is None:
            raise RuntimeError("an expert's Hessian is read once")
        return self._hessian


class InPlaceAlgebra(GroupAlgebra):
    """Of one group, with three matrices of the Hessian's size at once."""

    def __init__(self, run: Run, block: Block, number: int, group: GroupInputs) -> None:
        super().__init__(run, block, number, group.names)
        self._group = group
        self._wide: InPlaceGroup | None = None

    def collect(self) -> Hessian:
        run = self._run
        cols = run.skeleton.shape(f"{self._block.name}.{self.names[0]}")[1]
        total = _sum_tokens(
            run, self._number, self._group, InPlaceHessianSum(cols, self._device, cross=self._group.paired)
        )
        weights = {name: run.weight(self._block, name) for name in self.names}
        with run.stage("factor", self._number):  # the factor takes the place of a copy of H, so both are made at once
            self._wide = InPlaceGroup(total, weights, run.recipe, run.strength)
        return self._wide.hessian

    def factorize(self) -> Factor:
        if self._wide is None:
            raise RuntimeError("collect comes before factorize")
        self._run.accounting.count_group(self._wide.hessian, self._rows(), self._group.paired)
        return self._wide.factor

    def targets(self, name: str) -> Iterator[Tensor]:
        if self._wide is None:
            raise RuntimeError("collect comes before targets")
        ranks = self._run.ranks
        return self._wide.targets(name, share=(ranks.rank, ranks.count))


def _sum_tokens(run: Run, number: int, group: GroupInputs, total: _Sum) -> _Sum:
    """H (and, with two streams, G) of the group's input, batch by batch as the walk gives them, over all ranks."""
    pairs = iter(group)
    while True:
        with run.stage("calibrate"):
            original, quantized = next(pairs, (None, None))
        if quantized is None:
            return run.ranks.sum_hessians(total)
        with run.stage("hessian", number):
            if original is None:
                total.add(quantized)
            else:
                total.add_pair(original, quantized)
        del original, quantized  # or they would wait for the next batch's pass to end

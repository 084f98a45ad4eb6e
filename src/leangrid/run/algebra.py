"""What has to be known before the linears that share a Hessian can be solved, and who solves which of them.

Each kind has the same steps: ``collect`` the Hessian, ``factorize`` it, give the corrected ``targets`` of one linear
after another, take what was solved by ``add``, and hand all of it out by ``results``.

* PlainAlgebra: the linears of a group read the same input. Of several ranks each solves some of the linears whole.
* ExpertAlgebra: the linears of one expert; its Hessian is made from the tokens that were routed to it (experts.py). Of
  several ranks each solves one expert at the same time.
* InPlaceAlgebra: as PlainAlgebra, where the group's matrices hardly fit (solve/in_place.py). Targets come some rows at
  a time, and of several ranks each solves a part of the rows of every linear.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from leangrid.models.walk import ExpertInputs, GroupInputs
from leangrid.run.accounting import LayerCosts, SolvedLinear
from leangrid.run.block import Block
from leangrid.run.experts import ExpertRound, expert_rounds
from leangrid.run.run import Run
from leangrid.solve.correction import Correction, correct
from leangrid.solve.factor import Factor, FactorSummary, factorize
from leangrid.solve.hessian import Hessian, HessianSum
from leangrid.solve.in_place import InPlaceGroup, InPlaceHessianSum, concatenate_results
from leangrid.solve.layer import LinearResult
from leangrid.solve.observer import Observer

_Sum = TypeVar("_Sum", bound=HessianSum)


def algebras(run: Run, block: Block, number: int, group: GroupInputs | ExpertInputs) -> "Iterator[GroupAlgebra]":
    """One for each Hessian that the group needs on this rank: a single one, or one after another for experts."""
    if isinstance(group, ExpertInputs):
        cols = run.skeleton.shape(block.paths(group.names)[0])[1]
        for experts in expert_rounds(run, group, number, cols):
            yield ExpertAlgebra(run, block, number, experts)
    elif run.states.placement.in_place:
        yield InPlaceAlgebra(run, block, number, group)
    else:
        yield PlainAlgebra(run, block, number, group)


@dataclass(frozen=True, eq=False)
class _Part:
    """Some rows of a linear, solved."""

    result: LinearResult
    factor: FactorSummary
    costs: LayerCosts
    share: float


class GroupAlgebra(ABC):
    """The steps that all kinds share: what was solved is collected here, and exchanged between ranks.

    Attributes:
        names: the linears of all ranks, as paths from the block.
        has_part: whether this rank solves any of them. Without a part only ``results`` is called.
    """

    has_part: bool = True
    _summary: FactorSummary | None = None

    def __init__(self, run: Run, block: Block, number: int, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._run, self._block, self._number = run, block, number
        self._device = run.states.algebra_device(number)
        self._watching = LayerCosts(self._device)
        self._solved: dict[str, list[_Part]] = {name: [] for name in names}
        self._shares: dict[str, float] = {}  # of the correction, by linear; none where the input is not corrected

    @abstractmethod
    def collect(self) -> Hessian:
        """H of the input, over the calibration tokens of all ranks."""

    @abstractmethod
    def factorize(self) -> Factor:
        """U with (H + lambda I)^-1 = U^T U; the correction is made from it."""

    @abstractmethod
    def targets(self, name: str) -> Iterator[Tensor]:
        """W~ of this rank's part of a linear, float32 [rows, cols], some rows after others."""

    def observer(self) -> Observer:
        """Watches the next ``solve_linear``; what it saw belongs to the result that is added next."""
        self._watching = LayerCosts(self._device)
        return self._watching

    def add(self, name: str, result: LinearResult) -> None:
        """Take what was solved for the next rows of the linear ``name``."""
        if self._summary is None:
            raise RuntimeError("factorize comes before add")
        self._solved[name].append(_Part(result, self._summary, self._watching, self._shares.get(name, 0.0)))

    def results(self) -> Iterator[SolvedLinear]:
        """Each linear whole, from all ranks."""
        ranks = [self._solved]
        if self._run.ranks.count > 1:  # between ranks everything goes through host memory
            for solved in self._solved.values():
                solved[:] = [replace(part, result=part.result.to("cpu")) for part in solved]
            ranks = self._run.ranks.gather(self._solved)
        for name in self.names:
            yield self._whole(name, [part for rank in ranks for part in rank.pop(name)])

    def _whole(self, name: str, parts: list[_Part]) -> SolvedLinear:
        """The rows of all parts as one result."""
        first = parts[0]
        for other in parts[1:]:
            first.costs.add(other.costs)
        result = concatenate_results([part.result.to(self._device) for part in parts])
        return SolvedLinear(name, result, first.factor, first.costs, first.share)

    def _cols(self) -> int:
        """Input features, which all the linears share."""
        return self._run.skeleton.shape(self._block.paths(self.names)[0])[1]

    def _rows(self) -> int:
        """Output features of all the linears that share the Hessian."""
        return sum(self._run.skeleton.shape(path)[0] for path in self._block.paths(self._sharing()))

    def _sharing(self) -> tuple[str, ...]:
        """The linears that share the Hessian."""
        return self.names


class _OnDevice(GroupAlgebra):
    """What PlainAlgebra and ExpertAlgebra share: factor and correction are made from a whole Hessian on the device."""

    _hessian: Hessian | None = None
    _correction: Correction | None = None

    def factorize(self) -> Factor:
        hessian, self._hessian, recipe = self._hessian, None, self._run.recipe
        if hessian is None:
            raise RuntimeError("collect comes before factorize")
        with self._run.stage("factor", self._number):
            factor = factorize(hessian.matrix, recipe.damping, recipe.act_order)
            if hessian.cross is not None and not factor.is_diagonal:
                self._correction = Correction.of(hessian.matrix, hessian.cross, factor, self._rows(), hessian.noise)
        self._run.accounting.count_group(hessian, self._rows(), self._correction is not None)
        self._summary = FactorSummary.of(hessian, factor)
        return factor

    def targets(self, name: str) -> Iterator[Tensor]:
        if not self._is_ours(name):
            return
        with self._run.stage("factor", self._number):
            weight = self._block.weight(name).to(self._device, torch.float32).contiguous()
            target, self._shares[name] = correct(weight, self._correction, self._run.strength)
            del weight
        yield target

    def _is_ours(self, name: str) -> bool:
        """Whether this rank solves the linear."""
        ranks = self._run.ranks
        return self.names.index(name) % ranks.count == ranks.rank


class PlainAlgebra(_OnDevice):
    """Of one group."""

    def __init__(self, run: Run, block: Block, number: int, group: GroupInputs) -> None:
        super().__init__(run, block, number, group.names)
        self._group = group

    def collect(self) -> Hessian:
        total = HessianSum(self._cols(), self._device, *_sums(self._run, self._group))
        total = _sum_tokens(self._run, self._number, self._group, total)
        with self._run.stage("hessian", self._number):
            self._hessian = total.finish()
        return replace(self._hessian, cross=None, noise=None)  # these are let go once the correction is made


class ExpertAlgebra(_OnDevice):
    """Of one expert a rank, whose Hessian was summed with those of the others. Its input is not corrected."""

    def __init__(self, run: Run, block: Block, number: int, experts: ExpertRound) -> None:
        super().__init__(run, block, number, [name for names in experts.names for name in names])
        self._ours = experts.names[run.ranks.rank] if experts.hessian is not None else ()
        self._hessian, self.has_part = experts.hessian, experts.hessian is not None

    def collect(self) -> Hessian:
        if self._hessian is None:
            raise RuntimeError("an expert's Hessian is collected once")
        return self._hessian

    def _sharing(self) -> tuple[str, ...]:
        return self._ours

    def _is_ours(self, name: str) -> bool:
        return name in self._ours


class InPlaceAlgebra(GroupAlgebra):
    """Of one group, with three matrices of the Hessian's size at once."""

    def __init__(self, run: Run, block: Block, number: int, group: GroupInputs) -> None:
        super().__init__(run, block, number, group.names)
        self._group = group
        self._in_place: InPlaceGroup | None = None

    def collect(self) -> Hessian:
        run = self._run
        total = InPlaceHessianSum(self._cols(), self._device, *_sums(run, self._group))
        total = _sum_tokens(run, self._number, self._group, total)
        weights = {name: self._block.weight(name) for name in self.names}
        with run.stage("factor", self._number):  # the factor takes the place of a copy of H, so both are made at once
            self._in_place = InPlaceGroup(total, weights, run.recipe, run.strength)
        self._shares = self._in_place.shares
        return self._in_place.hessian

    def factorize(self) -> Factor:
        if self._in_place is None:
            raise RuntimeError("collect comes before factorize")
        hessian, factor = self._in_place.hessian, self._in_place.factor
        self._run.accounting.count_group(hessian, self._rows(), self._in_place.corrects)
        self._summary = FactorSummary.of(hessian, factor)
        return factor

    def targets(self, name: str) -> Iterator[Tensor]:
        if self._in_place is None:
            raise RuntimeError("collect comes before targets")
        ranks = self._run.ranks
        return self._in_place.targets(name, share=(ranks.rank, ranks.count))


def _sum_tokens(run: Run, number: int, group: GroupInputs, total: _Sum) -> _Sum:
    """H (and, with two streams, G) of the group's input, batch by batch as the walk gives them, over all ranks."""
    batches = group.numbered()
    while True:
        with run.stage("calibrate"):
            batch, original, quantized = next(batches, (0, None, None))
        if quantized is None:
            return run.ranks.sum_hessians(total)
        with run.stage("hessian", number):
            total.begin_half(run.is_in_first_half(batch))
            if original is None:
                total.add(quantized)
            else:
                total.add_pair(original, quantized)
        del original, quantized  # or they would wait for the next batch's pass to end


def _sums(run: Run, group: GroupInputs) -> tuple[bool, bool]:
    """Whether G is summed, and whether in halves: with two streams, unless they are there for block tuning alone."""
    corrected = group.paired and run.strength != 0
    return corrected, corrected and run.strength is None

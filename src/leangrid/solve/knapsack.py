"""The least loss within a budget: of every item one option is taken, and their sizes may add up to no more.

This is the multiple-choice knapsack. It is solved exactly: item after item, the sums that no other sum beats in both
size and loss are kept (dynamic programming over non-dominated states), and of these only the ones that could still end
below a solution that is known. What the items that follow can save at most says the linear relaxation, whose optimum is
greedy along each item's lower convex hull (Sinha and Zoltners 1979, Operations Research 27(3))."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from leangrid.errors import RecipeError

_ROUNDING = 1e-12  # share of the losses by which sums in another order may differ


@dataclass(frozen=True)
class Option:
    """What an item may be: its ``size``, an integer of any unit, and its ``loss``, finite."""

    size: int
    loss: float


@dataclass(frozen=True, eq=False)
class _Bound:
    """The most that some items can save over their smallest options: a concave function of the size that is left."""

    least_size: int
    least_loss: float
    sizes: Tensor  # cumulative, from 0
    saved: Tensor  # cumulative, from 0

    def loss(self, left: Tensor) -> Tensor:
        """No choice of the items whose sizes fit into ``left`` (int64, at least ``least_size``) has a loss below
        this."""
        room = (left - self.least_size).double()
        at = torch.searchsorted(self.sizes, room, right=True).clamp(max=len(self.sizes) - 1)
        before = at - 1
        width = (self.sizes[at] - self.sizes[before]).clamp(min=1.0)
        share = ((room - self.sizes[before]) / width).clamp(0.0, 1.0)
        return self.least_loss - (self.saved[before] + share * (self.saved[at] - self.saved[before]))


def spend(items: Sequence[Sequence[Option]], budget: int) -> list[int]:
    """Choose one option of each item so that the sum of losses is least and the sum of sizes at most ``budget``.

    Args:
        items: the options of each item; at least one each.
        budget: in the unit of the sizes.

    Returns:
        For each item the number of its option. Where several choices are best, the same one each time.

    Raises:
        RecipeError: the smallest options of all items are larger than the budget, or a loss is not finite.

    Example:
        >>> small, large = Option(2, 4.0), Option(4, 1.0)
        >>> spend([[small, large], [small, Option(4, 3.0)]], 6)
        [1, 0]
    """
    useful, hulls = _prepared(items, budget)
    chosen = _greedy(items, hulls, budget)
    best = sum(options[number].loss for options, number in zip(items, chosen, strict=True))
    slack = _ROUNDING * sum(max(abs(option.loss) for option in options) for options in items)
    bounds = _bounds(items, hulls)
    sizes, losses = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    steps: list[tuple[Tensor, Tensor]] = []  # of each item: the state before, and the number of the option
    for options, kept, bound in zip(items, useful, bounds, strict=True):
        added = torch.tensor([options[number].size for number in kept])
        cost = torch.tensor([options[number].loss for number in kept], dtype=torch.float64)
        all_sizes, all_losses = (sizes[:, None] + added).view(-1), (losses[:, None] + cost).view(-1)
        fits = all_sizes + bound.least_size <= budget
        fits &= all_losses + bound.loss(budget - all_sizes) <= best + slack
        alive = fits.nonzero().squeeze(1)
        alive = alive[_not_dominated(all_sizes[alive], all_losses[alive])]
        steps.append((alive // len(kept), torch.tensor(kept)[alive % len(kept)]))
        sizes, losses = all_sizes[alive], all_losses[alive]
    state, numbers = len(losses) - 1, list[int]()  # the last of the sums has the least loss
    for before, numbered in reversed(steps):
        numbers.append(int(numbered[state]))
        state = int(before[state])
    return numbers[::-1]


def spend_roughly(items: Sequence[Sequence[Option]], budget: int) -> list[int]:
    """As ``spend``, but not the least: the largest saving for its size first, as long as it fits. It takes no time."""
    return _greedy(items, _prepared(items, budget)[1], budget)


def _prepared(items: Sequence[Sequence[Option]], budget: int) -> tuple[list[list[int]], list[list[int]]]:
    """Of each item the options not dominated, and those on its hull; RecipeError for what ``spend`` refuses."""
    if not all(abs(option.loss) < float("inf") for options in items for option in options):
        raise RecipeError("a loss is NaN or infinite", "the budget")
    useful = [_useful(options) for options in items]
    least = sum(options[kept[0]].size for options, kept in zip(items, useful, strict=True))
    if least > budget:
        raise RecipeError(f"the smallest choice takes {least}, the budget is {budget}", "the budget")
    return useful, [_hull(options, kept) for options, kept in zip(items, useful, strict=True)]


def _useful(options: Sequence[Option]) -> list[int]:
    """The options that no other beats in both size and loss, by ascending size."""
    order = sorted(range(len(options)), key=lambda number: (options[number].size, options[number].loss, number))
    kept: list[int] = []
    for number in order:
        if not kept or options[number].loss < options[kept[-1]].loss:
            kept.append(number)
    return kept


def _hull(options: Sequence[Option], kept: Sequence[int]) -> list[int]:
    """Those of ``kept`` on the lower convex hull of loss over size."""
    hull: list[int] = []
    for number in kept:
        while len(hull) > 1 and _slope(options, hull[-1], number) <= _slope(options, hull[-2], hull[-1]):
            hull.pop()
        hull.append(number)
    return hull


def _slope(options: Sequence[Option], one: int, other: int) -> float:
    return (options[other].loss - options[one].loss) / (options[other].size - options[one].size)


def _segments(items: Sequence[Sequence[Option]], hulls: Sequence[Sequence[int]]) -> list[tuple[float, int, int, int]]:
    """(slope, item, option before, option after) of all hulls, the largest saving for its size first."""
    found = [
        (_slope(items[item], one, other), item, one, other)
        for item, hull in enumerate(hulls)
        for one, other in pairwise(hull)
    ]
    return sorted(found, key=lambda segment: (segment[0], segment[1], items[segment[1]][segment[2]].size))


def _greedy(items: Sequence[Sequence[Option]], hulls: Sequence[Sequence[int]], budget: int) -> list[int]:
    """A choice within the budget: along the hulls, the largest saving for its size first, as long as it fits."""
    chosen = [hull[0] for hull in hulls]
    left = budget - sum(options[number].size for options, number in zip(items, chosen, strict=True))
    for _, item, one, other in _segments(items, hulls):
        needed = items[item][other].size - items[item][one].size
        if chosen[item] == one and needed <= left:
            chosen[item], left = other, left - needed
    return chosen


def _bounds(items: Sequence[Sequence[Option]], hulls: Sequence[Sequence[int]]) -> list[_Bound]:
    """Of each item the bound of those that follow it."""
    segments, found = _segments(items, hulls), list[_Bound]()
    for item in range(len(items)):
        mine = [segment for segment in segments if segment[1] > item]
        wide = torch.tensor([0] + [items[i][b].size - items[i][a].size for _, i, a, b in mine], dtype=torch.float64)
        saved = [0.0] + [items[i][a].loss - items[i][b].loss for _, i, a, b in mine]
        firsts = [items[i][hulls[i][0]] for i in range(item + 1, len(items))]
        least = sum(first.size for first in firsts), sum((first.loss for first in firsts), 0.0)
        # One more point without saving behind the last: there is always one on either side.
        sizes = torch.cat((wide.cumsum(0), wide.sum()[None] + 1))
        savings = torch.tensor([*saved, 0.0], dtype=torch.float64).cumsum(0)
        found.append(_Bound(*least, sizes, savings))
    return found


def _not_dominated(sizes: Tensor, losses: Tensor) -> Tensor:
    """Which sums no other beats in both, by ascending size and descending loss; of equal ones the first."""
    order = torch.argsort(losses, stable=True)
    order = order[torch.argsort(sizes[order], stable=True)]
    least = losses[order].cummin(0).values
    below = torch.ones(len(order), dtype=torch.bool)
    below[1:] = losses[order][1:] < least[:-1]
    return order[below]

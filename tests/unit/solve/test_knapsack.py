"""The knapsack against all choices there are."""

import itertools
import random

import pytest

from leangrid.errors import RecipeError
from leangrid.solve.knapsack import Option, spend, spend_roughly


def _total(items: list[list[Option]], chosen: list[int]) -> tuple[int, float]:
    taken = [options[number] for options, number in zip(items, chosen, strict=True)]
    return sum(option.size for option in taken), sum(option.loss for option in taken)


def _items(draw: random.Random) -> list[list[Option]]:
    """Few sizes and losses, so that many sums are equal, options are dominated and some lie above the hull."""
    losses = [draw.random() if draw.random() < 0.5 else round(draw.random(), 1) for _ in range(24)]
    count = draw.randint(1, 5)
    return [[Option(draw.randint(1, 9), draw.choice(losses)) for _ in range(draw.randint(1, 4))] for _ in range(count)]


@pytest.mark.parametrize("seed", range(150))
def test_no_choice_is_better(seed: int) -> None:
    draw = random.Random(seed)
    items = _items(draw)
    least = sum(min(option.size for option in options) for options in items)
    budget = draw.randint(least, least + 25)
    every = (_total(items, list(chosen)) for chosen in itertools.product(*(range(len(one)) for one in items)))
    best = min(loss for size, loss in every if size <= budget)
    size, loss = _total(items, spend(items, budget))
    assert size <= budget
    assert loss == pytest.approx(best, abs=1e-12)
    size, rough = _total(items, spend_roughly(items, budget))
    assert size <= budget
    assert rough >= best - 1e-12


def test_it_is_exact_where_greed_is_not_and_over_many_items() -> None:
    """Against the table over all sizes, which is another algorithm."""
    draw = random.Random(0)
    widths = (2, 3, 4, 5, 6, 8)
    shapes, slopes = [3, 5, 16, 7], [draw.lognormvariate(0, 1.5) for _ in range(48)]
    items = [[Option(shapes[n % 4] * b, slope * 4.0**-b) for b in widths] for n, slope in enumerate(slopes)]
    budget, behind = sum(options[2].size for options in items) - 1, 0
    table = {0: 0.0}
    for options in items:
        more: dict[int, float] = {}
        for size, loss in table.items():
            for option in options:
                both = size + option.size
                more[both] = min(more.get(both, float("inf")), loss + option.loss)
        table = more
    for room in range(budget, budget - 40, -1):
        size, loss = _total(items, spend(items, room))
        assert size <= room
        assert loss == pytest.approx(min(one for at, one in table.items() if at <= room), rel=1e-12)
        behind += _total(items, spend_roughly(items, room))[1] > loss * (1 + 1e-9)
    assert behind > 5  # else this shows nothing that the greedy choice would not


def test_what_cannot_be_spent_is_refused() -> None:
    with pytest.raises(RecipeError, match="takes 4, the budget is 3"):
        spend([[Option(2, 1.0)], [Option(2, 1.0), Option(3, 0.0)]], 3)
    with pytest.raises(RecipeError, match="NaN"):
        spend([[Option(2, float("nan"))]], 3)

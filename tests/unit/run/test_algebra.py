"""The parts of linears that several ranks solved come together in the order of their rows."""

from types import SimpleNamespace
from typing import Any

import torch

from leangrid.recipe import Recipe
from leangrid.run.accounting import LayerCosts
from leangrid.run.algebra import GroupAlgebra, PlainAlgebra, _Part
from leangrid.solve.factor import FactorSummary, factorize
from leangrid.solve.layer import LinearResult, solve_linear

CPU = torch.device("cpu")
SUMMARY = FactorSummary(64, 0.01, torch.ones(16, dtype=torch.float64), ())


def algebra_of(names: tuple[str, ...], rank: int, count: int, gathered: list[dict[str, Any]]) -> GroupAlgebra:
    """An algebra on rank ``rank`` whose ranks give ``gathered`` to each other; it was made by no run."""
    algebra = object.__new__(PlainAlgebra)
    algebra.names, algebra._device, algebra._number = names, CPU, 0
    ranks = SimpleNamespace(rank=rank, count=count, gather=lambda mine: gathered or [mine])
    algebra._run = SimpleNamespace(ranks=ranks)  # pyright: ignore[reportAttributeAccessIssue]
    algebra._solved, algebra._summary = {name: [] for name in names}, SUMMARY
    algebra._shares = {"k": 0.25}
    return algebra


def solved(rows: int, seed: int) -> LinearResult:
    weight = torch.randn(rows, 16, generator=torch.Generator().manual_seed(seed))
    return solve_linear(weight, factorize(torch.eye(16)), torch.eye(16), Recipe(scheme="NU2").resolved())


def test_one_rank_gives_each_linear_back_with_its_costs() -> None:
    algebra, results = algebra_of(("q", "k"), 0, 1, []), {"q": solved(4, 0), "k": solved(6, 1)}
    for name, result in results.items():
        algebra.observer()
        algebra.add(name, result)
    whole = list(algebra.results())
    assert [one.name for one in whole] == ["q", "k"]
    assert all(torch.equal(one.result.codes, results[one.name].codes) for one in whole)
    assert whole[0].costs is not whole[1].costs and whole[0].factor is SUMMARY
    assert [one.share for one in whole] == [0.0, 0.25]


def test_tiles_of_rows_stand_in_the_order_of_ranks_and_of_their_rows() -> None:
    tiles = [solved(2, seed) for seed in range(3)]
    costs = [LayerCosts(CPU) for _ in tiles]
    for number, one in enumerate(costs):
        one.seconds["solve"] = 1.0 + number
    parts = [_Part(tile, SUMMARY, cost, 0.25) for tile, cost in zip(tiles, costs, strict=True)]
    gathered = [{"down": parts[:2]}, {"down": parts[2:]}]
    algebra = algebra_of(("down",), 0, 2, gathered)
    (whole,) = algebra.results()
    assert torch.equal(whole.result.codes, torch.cat([tile.codes for tile in tiles]))
    assert (
        whole.result.loss == sum(tile.loss for tile in tiles)
        and whole.share == 0.25
        and whole.costs.seconds["solve"] == 6.0
    )


def test_of_two_ranks_each_solves_every_second_linear() -> None:
    names = ("q", "k", "v")
    for rank, expected in ((0, ["q", "v"]), (1, ["k"])):
        algebra = algebra_of(names, rank, 2, [])
        algebra._run.stage = lambda *_: torch.no_grad()
        algebra._run.strength, algebra._correction = 0.0, None  # pyright: ignore[reportAttributeAccessIssue]
        algebra._block = SimpleNamespace(weight=lambda _name: torch.ones(2, 16))  # pyright: ignore
        assert [name for name in names if list(algebra.targets(name))] == expected

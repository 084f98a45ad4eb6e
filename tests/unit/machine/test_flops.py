"""Counted operations against counts by hand, and against a walk that does more of them."""

from pathlib import Path

import pytest
import tiny_models
from math_problems import layer

from leangrid.machine import flops
from leangrid.models.skeleton import Skeleton
from leangrid.planning.placement import Placement
from leangrid.recipe import Recipe
from leangrid.run.accounting import LayerCosts
from leangrid.run.quantize import quantize
from leangrid.solve.layer import solve_linear
from leangrid.storage.source import open_source

WINDOWS = tiny_models.tokens(6, 48)


def test_a_factor_and_its_inverse_need_two_thirds_of_a_cube() -> None:
    assert flops.factor(30, done=False) == pytest.approx(2 / 3 * 30**3)
    assert flops.factor(30, done=True) == pytest.approx(4 / 3 * 30**3) == pytest.approx(flops.factor(30, True, False))
    assert flops.factor(4096, True) < 0.51 * flops.factor(4096, True, halves=False)
    assert flops.hessian(100, 10, streams=1) == pytest.approx(2 * 100 * 55)  # the triangle has 55 entries
    assert flops.hessian(100, 10, streams=2) == pytest.approx(2 * 100 * 155)
    assert flops.refine(4, 8, 0) == 0
    assert flops.correction(4, 20, True, measured=True) == 5 * 2 * 4 * 20 * 20  # D and noise, each by U^T, and by U
    assert flops.correction(40, 20, True, measured=True) == 2 * 2 * 20**3 + 3 * 2 * 40 * 20 * 20


@pytest.mark.parametrize("scheme", ["W4A16_G32", "NU4"])
@pytest.mark.parametrize("correct", [pytest.param(0.0, marks=pytest.mark.slow), 0.5, "auto"])
def test_a_run_says_what_it_needed_and_what_it_did(scheme: str, correct: float | str, tmp_path: Path) -> None:
    source = tiny_models.save(tiny_models.NAMES[0], tmp_path / "source")
    recipe = Recipe.model_validate({"scheme": scheme, "correct": correct, "guard": False})
    once = quantize(source, tmp_path / "once", recipe, windows=WINDOWS).flops
    again = quantize(
        source, tmp_path / "again", recipe, windows=WINDOWS, placement=Placement(windows=6, replay=True)
    ).flops
    skeleton = Skeleton(open_source(source))
    shapes = [skeleton.shape(n) for n in skeleton.all_linear_names()]
    streams, tokens = 2 if correct else 1, WINDOWS.numel()
    assert once["needed"]["calibrate"] == sum(2 * streams * tokens * rows * cols for rows, cols in shapes)
    assert (
        once["done"]["calibrate"] == once["needed"]["calibrate"]
    )  # the paused walk multiplies once a token and stream
    assert again["done"]["calibrate"] > 1.5 * again["needed"]["calibrate"]
    assert once["needed"] == again["needed"]
    assert "baseline" not in once["needed"] and once["done"]["baseline"] > 0
    for counted in (once, again):
        for kind, stages in counted.items():
            assert stages["total"] == pytest.approx(sum(v for k, v in stages.items() if k != "total")), kind
        assert all(counted["done"][stage] >= count * (1 - 1e-12) for stage, count in counted["needed"].items())


def test_the_guard_is_work_that_was_not_needed() -> None:
    w, matrix, factor = layer(64, 96)
    rows, cols = w.shape
    counted = []
    for guard in (False, True):
        recipe, costs = Recipe(scheme="W4A16", p=16, refine=0, guard=guard).resolved(), LayerCosts(w.device)
        solve_linear(w, factor, matrix, recipe, observer=costs)
        counted.append(costs.flops["solve"])
    assert counted[0] == flops.sweep(rows, cols)
    assert counted[1] > counted[0]


def test_exact_counts_the_inverse_of_each_row() -> None:
    w, matrix, factor = layer(6, 24)
    costs = LayerCosts(w.device)
    solve_linear(w, factor, matrix, Recipe(scheme="NU3_EXACT", guard=False).resolved(), observer=costs)
    assert costs.flops["solve"] == flops.exact(6, 24) == 6 * 24**3 / 3

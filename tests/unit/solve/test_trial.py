"""Trial losses against whole solutions."""

import pytest
import torch

from leangrid.grids import Precision
from leangrid.recipe import Recipe
from leangrid.solve.factor import factorize
from leangrid.solve.layer import solve_linear
from leangrid.solve.trial import ROWS, trial_losses

SCHEMES = ("W2A16_G16", "W4A16", "W3A16_G32_SYM", "GPTQ3_G16", "RTN4", "Q4_K")


def _problem(rows: int, cols: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(256, cols, generator=generator) @ torch.randn(cols, cols, generator=generator)
    return torch.randn(rows, cols, generator=generator), 2 / 256 * inputs.T @ inputs


def _recipes() -> list[Recipe]:
    return [Recipe(scheme=scheme, refine=0, guard=False, correct=0.0, steps=64).resolved() for scheme in SCHEMES]


def test_of_all_rows_they_are_the_solver_s_without_refit() -> None:
    weight, hessian = _problem(48)
    factor = factorize(hessian)
    found = trial_losses(weight, factor, hessian, _recipes(), Precision(torch.bfloat16))
    for recipe, (solved, rounded) in zip(_recipes(), found.tolist(), strict=True):
        whole = solve_linear(weight, factor, hessian, recipe, Precision(torch.bfloat16))
        assert rounded == pytest.approx(whole.loss_rounding, rel=1e-5), recipe.scheme
        assert solved == pytest.approx(whole.loss, rel=2e-3), recipe.scheme  # which is made without a product with H


def test_some_rows_stand_for_all() -> None:
    weight, hessian = _problem(ROWS)
    factor, precision = factorize(hessian), Precision(torch.float32)
    once = trial_losses(weight, factor, hessian, _recipes(), precision)
    thrice = trial_losses(weight.repeat_interleave(3, 0), factor, hessian, _recipes(), precision)
    assert torch.allclose(thrice, 3 * once, rtol=1e-6)

"""The row that a run keeps for its figure: what the file holds, in every kind of grid, and never many numbers."""

import json

import pytest
import torch
from math_problems import layer

from leangrid.recipe import Recipe
from leangrid.report.sample import POINTS, sample_row
from leangrid.solve.factor import Factor, FactorSummary, factorize
from leangrid.solve.layer import solve_linear


def summary(factor: Factor) -> FactorSummary:
    return FactorSummary(1, factor.damping, factor.diagonal, ())


def sample(scheme: str, rows: int = 9, cols: int = 64) -> tuple[dict, torch.Tensor, torch.Tensor]:
    """The sample, the row's weights and what was stored of them."""
    weight, matrix, _ = layer(rows, cols)
    recipe = Recipe(scheme=scheme).resolved()
    factor = factorize(matrix)
    result = solve_linear(weight, factor, matrix, recipe)
    found = sample_row("a.b", weight, result, summary(factor), recipe)
    return found, weight[found["row"]], result.grid.dequantize(result.codes)[found["row"]]


@pytest.mark.parametrize(
    ("scheme", "columns", "levels"),
    [
        ("NU3", 64, 8),
        ("NU4_EXACT", 64, 16),
        ("W4A16", 64, 16),
        ("W4A16_G16", 16, 16),
        ("W3A16_G16_SYM", 16, 8),
        ("GPTQ4", 64, 16),
        ("RTN4_G16", 16, 16),
    ],
)
def test_it_is_a_row_of_the_file(scheme: str, columns: int, levels: int) -> None:
    found, weight, stored = sample(scheme)
    first, last, count = found["columns"]
    assert count == columns == len(found["weights"]) == len(found["costs"]) and last - first + 1 == count
    assert found["weights"] == pytest.approx(weight[first : last + 1].tolist(), rel=1e-3, abs=1e-6)
    assert found["stored"] == pytest.approx(stored[first : last + 1].tolist(), rel=1e-3, abs=1e-6)
    assert 1 <= len(found["levels"]) <= levels and found["levels"] == sorted(found["levels"])
    assert all(
        min(abs(value - level) for level in found["levels"]) < 1e-3 * abs(value) + 1e-6 for value in found["stored"]
    )
    assert len(found["levels_minmax"]) <= levels and found["levels_minmax"][0] <= 0 <= found["levels_minmax"][-1]
    assert max(found["costs"]) <= 1 and json.loads(json.dumps(found, allow_nan=False)) == found


def test_the_costliest_column_is_in_it() -> None:
    for scheme in ("NU3", "W4A16_G16"):
        found, _, _ = sample(scheme)
        assert max(found["costs"]) == 1.0


def test_a_block_type_of_llama_cpp() -> None:
    found, _, _ = sample("Q4_K", cols=256)
    assert found["columns"][2] == 32 and len(found["levels"]) <= 16 and len(found["levels_minmax"]) <= 16


def test_wide_rows_stay_small_and_keep_their_costliest() -> None:
    weight, recipe = torch.randn(2, 5000, generator=torch.Generator().manual_seed(0)), Recipe(scheme="RTN4").resolved()
    matrix = torch.diag(torch.linspace(1.0, 50.0, 5000))
    factor = factorize(matrix)
    found = sample_row("a.b", weight, solve_linear(weight, factor, matrix, recipe), summary(factor), recipe)
    assert len(found["weights"]) == POINTS and found["columns"] == [0, 4999, 5000] and len(json.dumps(found)) < 40_000
    assert sorted(found["costs"])[-100] == pytest.approx(
        float(factor.loss_error_weights(recipe.p or 4.0).sort().values[-100]), rel=1e-3
    )

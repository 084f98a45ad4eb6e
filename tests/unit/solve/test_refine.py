"""Refinement: no row gets worse, refits are least squares, grids stay storable."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from math_problems import grid, layer, losses

from leangrid.grids import AffineGrid, Grid, NonuniformGrid, OffsetGrid, Precision
from leangrid.solve.refine import refine
from leangrid.solve.sweep import sweep

KINDS = [("minmax", None), ("affine", 33), ("minmax", 11), ("offset", 33), ("levels", None)]


@given(
    kind=st.sampled_from(KINDS),
    bits=st.sampled_from([2, 3, 4]),
    rounds=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    swept=st.booleans(),
    seed=st.integers(0, 999),
)
def test_no_row_gets_worse(
    kind: tuple[str, int | None], bits: int, rounds: int, dtype: torch.dtype, swept: bool, seed: int
) -> None:
    w, _, factor = layer(6, 165, seed)
    before: Grid = grid(kind[0], w, bits, kind[1]).rounded(dtype)
    codes = sweep(w, factor, before).codes if swept else before.nearest(w)
    result = refine(w, codes, before, factor.damped, rounds, Precision(dtype))
    new_codes, after = result.codes, result.grid
    old, new = (losses(g.dequantize(c), w, factor.damped) for c, g in ((codes, before), (new_codes, after)))
    assert bool((new <= old * (1 + 1e-4)).all())
    assert float(new.sum()) < float(old.sum())
    assert int(new_codes.max()) < 2**bits
    assert torch.equal(after.rounded(dtype).levels, after.levels)  # what is stored is what was judged
    torch.testing.assert_close(result.loss, new.double(), rtol=1e-3, atol=1e-6 * float(old.sum()))


def test_scales_become_the_joint_least_squares_solution() -> None:
    w, _, factor = layer(4, 24)
    found = grid("minmax", w, 4, 8)
    codes = sweep(w, factor, found).codes
    for _ in range(30):  # to a fixed point of codes and scales
        result = refine(w, codes, found, factor.damped, 1)
        codes, found = result.codes, result.grid
    assert isinstance(found, AffineGrid)
    root = torch.linalg.cholesky(factor.damped.double())
    for r in range(4):
        unit = codes[r].double() - found.zero_point[r].double().repeat_interleave(8)
        design = torch.stack([root.T @ (unit * (torch.arange(24) // 8 == g)) for g in range(3)], dim=1)
        best = torch.linalg.lstsq(design, (root.T @ w[r].double())[:, None]).solution[:, 0]
        torch.testing.assert_close(found.scale[r].double(), best, rtol=2e-3, atol=0)


def test_scales_and_offsets_become_the_joint_least_squares_solution() -> None:
    w, _, factor = layer(4, 24)
    found = grid("offset", w, 4, 8)
    codes = sweep(w, factor, found).codes
    for _ in range(30):
        result = refine(w, codes, found, factor.damped, 1)
        codes, found = result.codes, result.grid
    assert isinstance(found, OffsetGrid)
    root = torch.linalg.cholesky(factor.damped.double())
    for r in range(4):
        inside = [(torch.arange(24) // 8 == g).double() for g in range(3)]
        design = torch.stack([root.T @ (unit * mask) for mask in inside for unit in (codes[r].double(), 1.0)], dim=1)
        best = torch.linalg.lstsq(design, (root.T @ w[r].double())[:, None]).solution.reshape(3, 2)
        torch.testing.assert_close(found.parameters[r].double(), best, rtol=5e-3, atol=1e-5)


def test_levels_become_the_least_squares_solution_and_stay_sorted() -> None:
    w, _, factor = layer(4, 60)
    found = grid("levels", w, 3)
    codes = sweep(w, factor, found).codes
    for _ in range(30):
        result = refine(w, codes, found, factor.damped, 1)
        codes, found = result.codes, result.grid
    assert isinstance(found, NonuniformGrid)
    root = torch.linalg.cholesky(factor.damped.double())
    for r in range(4):
        used = codes[r].unique().long()
        design = root.T @ (codes[r, :, None] == used).double()
        best = torch.linalg.lstsq(design, (root.T @ w[r].double())[:, None]).solution[:, 0]
        torch.testing.assert_close(found.levels[r, used].double(), best, rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("kind", ["minmax", "offset", "levels"])
def test_refining_is_the_same_for_each_row_alone(kind: str) -> None:
    w, _, factor = layer(5, 40)
    found = grid(kind, w, 3)
    result = refine(w, found.nearest(w), found, factor.damped, 1)
    for r in range(5):
        row = torch.tensor([r])
        alone = refine(w[row], found.select_rows(row).nearest(w[row]), found.select_rows(row), factor.damped, 1)
        assert torch.equal(result.codes[row], alone.codes)
        torch.testing.assert_close(result.grid.select_rows(row).levels, alone.grid.levels, rtol=1e-4, atol=1e-7)


def test_levels_without_codes_and_perfect_rows_survive() -> None:
    levels = torch.tensor([[-1.0, 0.0, 0.5, 7.0]]).repeat(3, 1)
    codes = torch.tensor([[0, 1, 2, 1], [1, 1, 1, 1], [0, 0, 2, 2]], dtype=torch.uint8)
    found = NonuniformGrid(levels)
    w = found.dequantize(codes)  # already exact: nothing can gain
    result = refine(w, codes, found, torch.eye(4), 2)
    assert torch.equal(result.grid.dequantize(result.codes), w)
    assert torch.equal(result.grid.levels, levels)

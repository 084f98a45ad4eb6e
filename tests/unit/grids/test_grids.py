"""Grids: nearest is nearest, the fits reach their optimum, degenerate rows stay finite, bad weights are refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from math_problems import generator, grid, weight
from reference import reference_affine, reference_kmeans

from leangrid.errors import ShapeError
from leangrid.grids import (
    AffineGrid,
    Grid,
    GroupedGrid,
    NonuniformGrid,
    OffsetGrid,
    fit_affine,
    fit_minmax,
    fit_nonuniform,
    fit_offset,
)
from leangrid.grids.affine import SHRINK
from leangrid.grids.nonuniform import sum_by_code, sum_code_by_code
from leangrid.schemes import AFFINE_BITS

KINDS = [("minmax", None), ("minmax", 8), ("affine", None), ("affine", 8), ("offset", 8), ("levels", None)]
ONES = torch.ones(32, dtype=torch.float64)


def level_of_each(found: Grid, cols: int) -> torch.Tensor:
    """Levels [rows, cols, K]."""
    levels = found.levels if found.levels.ndim == 3 else found.levels[:, None]
    return levels.repeat_interleave(cols // levels.shape[1], dim=1)


@pytest.mark.parametrize(("kind", "group_size"), KINDS)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_nearest_picks_the_nearest_level(kind: str, group_size: int | None, bits: int) -> None:
    w = weight(5, 32)
    found = grid(kind, w, bits, group_size)
    codes = found.nearest(w)
    distance = (level_of_each(found, 32) - w[..., None]).abs()
    chosen = distance.gather(2, codes[..., None].long())[..., 0]
    assert found.bits == bits
    assert int(codes.max()) < 2**bits
    assert torch.equal(found.dequantize(codes), level_of_each(found, 32).gather(2, codes[..., None].long())[..., 0])
    assert bool((chosen <= distance.amin(2) * (1 + 1e-5) + 1e-9).all())
    assert torch.equal(found.nearest(found.dequantize(codes)), codes)  # levels are fixed points


def test_a_weight_between_two_levels_takes_the_lower() -> None:
    found = NonuniformGrid(torch.tensor([[-1.0, 0.0, 1.0, 4.0]]))
    assert found.nearest(torch.tensor([[-0.5, 0.5, 2.5, -9.0, 9.0]])).tolist() == [[0, 1, 2, 0, 3]]


@pytest.mark.parametrize(("kind", "group_size"), KINDS)
def test_whole_rows_are_selected_and_replaced(kind: str, group_size: int | None) -> None:
    found, other = grid(kind, weight(6, 32), 3, group_size), grid(kind, weight(2, 32, seed=1), 3, group_size)
    rows = torch.tensor([4, 1])
    mixed = found.replace_rows(rows, other)
    assert torch.equal(mixed.select_rows(rows).levels, other.levels)
    kept = torch.tensor([True, False, True, True, False, True])
    assert torch.equal(mixed.select_rows(kept).levels, found.select_rows(kept).levels)


@pytest.mark.parametrize(("kind", "group_size"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("magnitude", [1e-12, 1.0, 1e8])
def test_rounded_parameters_are_exact_in_their_dtype(
    kind: str, group_size: int | None, dtype: torch.dtype, magnitude: float
) -> None:
    rounded = grid(kind, weight(4, 32) * magnitude, 4, group_size).rounded(dtype)
    stored = rounded.scale if isinstance(rounded, GroupedGrid) else rounded.levels
    assert torch.equal(stored.to(dtype).float(), stored)
    assert bool(stored.isfinite().all())
    assert isinstance(rounded, NonuniformGrid) or bool((stored > 0).all())


@pytest.mark.parametrize("group_size", [None, 4, 16])
@pytest.mark.parametrize("bits", AFFINE_BITS)
def test_minmax_reaches_both_ends_and_zero(bits: int, group_size: int | None) -> None:
    w = weight(6, 32)
    found = fit_minmax(w, bits, group_size)
    parts = w.reshape(6, -1, group_size or 32)
    lo, hi = parts.amin(2).clamp(max=0), parts.amax(2).clamp(min=0)
    torch.testing.assert_close(found.scale, (hi - lo) / (2**bits - 1))
    assert bool((found.levels == 0).any(2).all())
    half = found.scale * 0.5001
    assert bool((found.levels[..., 0] - lo).abs().le(half).all())
    assert bool((found.levels[..., -1] - hi).abs().le(half).all())


def test_symmetric_grids_fix_the_zero_point() -> None:
    w = weight(6, 32)
    for found in (fit_minmax(w, 4, 8, symmetric=True), fit_affine(w, ONES, 4, 64, 8, symmetric=True)):
        assert bool((found.zero_point == 8).all())
    negative = fit_affine(torch.tensor([[1.0, -0.2, 0.1, 0.3]]), ONES[:4], 2, 64, symmetric=True)
    assert float(negative.scale) < 0  # with 2 bits the levels are -2S..S: only a negative S reaches far up


@given(bits=st.sampled_from([2, 3, 4, 5, 6]), cols=st.integers(2, 24), seed=st.integers(0, 99))
def test_the_affine_search_reaches_the_literal_optimum(bits: int, cols: int, seed: int) -> None:
    w, g = weight(1, cols, seed), torch.rand(cols, generator=generator(seed)).double() + 0.01
    found = fit_affine(w, g, bits, 32)
    objective = float((g * (found.dequantize(found.nearest(w)) - w)[0].double().square()).sum())
    best = reference_affine(w[0], g, bits, 32, SHRINK.get(bits, 0.2))[2]
    assert objective == pytest.approx(best, rel=1e-4, abs=1e-14)


def weighted(found: Grid, w: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """sum g (quant(w) - w)^2 of each row, float64."""
    return (g * (found.dequantize(found.nearest(w)) - w).double().square()).sum(1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", AFFINE_BITS)
def test_a_free_offset_is_stored_exactly_and_costs_no_more_than_an_integer_zero_point(
    bits: int, dtype: torch.dtype
) -> None:
    w, g = weight(20, 64), torch.rand(64, generator=generator(0)).double() + 0.01
    found, affine = fit_offset(w, g, bits, 256, 16, dtype), fit_affine(w, g, bits, 256, 16, scale_dtype=dtype)
    stored = OffsetGrid(affine.scale, -affine.scale * affine.zero_point, bits, 16).rounded(dtype)
    assert torch.equal(found.rounded(dtype).levels, found.levels)
    assert bool((weighted(found, w, g) <= weighted(stored, w, g) * (1 + 1e-6)).all())
    if dtype != torch.bfloat16 or bits < 8:  # 8 mantissa bits: an offset of 128 steps is off by up to half a step
        assert float(weighted(found, w, g).sum()) < float(weighted(affine, w, g).sum())
    away, near = fit_offset(w + 1, g, bits, 256, 16), fit_offset(w, g, bits, 256, 16)  # float32
    assert float(weighted(away, w + 1, g).sum()) < 1.3 * float(
        weighted(near, w, g).sum()
    )  # 0 is no level that every group needs


def test_one_level_a_group_needs_no_more_than_the_offset() -> None:
    w = torch.tensor([[0.25] * 8 + [-3.0] * 8 + [0.0] * 8])
    found = fit_offset(w, torch.ones(24, dtype=torch.float64), 4, 64, 8, torch.float16)
    torch.testing.assert_close(found.dequantize(found.nearest(w)), w, rtol=1e-3, atol=0)


@pytest.mark.fault("N8")
@given(levels=st.sampled_from([2, 4]), cols=st.integers(1, 9), distinct=st.integers(1, 9), seed=st.integers(0, 99))
def test_the_nonuniform_fit_reaches_the_brute_force_optimum(levels: int, cols: int, distinct: int, seed: int) -> None:
    random = generator(seed)
    w = torch.randn(distinct, generator=random)[torch.randint(distinct, (1, cols), generator=random)]
    g = torch.rand(cols, generator=random).double() * (torch.rand(cols, generator=random) > 0.2) + 1e-9
    found = fit_nonuniform(w, g, levels)
    objective = float((g * (found.dequantize(found.nearest(w)) - w)[0].double().square()).sum())
    assert objective == pytest.approx(reference_kmeans(w[0], g, levels)[1], rel=1e-4, abs=1e-10)


@pytest.mark.fault("N8")
@pytest.mark.parametrize("search", ["optimal", "lloyd"])
def test_learned_levels_are_no_worse_than_minmax_on_their_objective(search: str) -> None:
    w, g = weight(20, 32), torch.rand(32, generator=generator(0)).double()
    learned, minmax = fit_nonuniform(w, g, 16, search), fit_minmax(w, 4)
    cost = [(g * (f.dequantize(f.nearest(w)) - w).double().square()).sum(1) for f in (learned, minmax)]
    assert bool((cost[0] <= cost[1]).all())


DEGENERATE = {
    "zeros": torch.zeros(2, 32),
    "constant": torch.full((2, 32), 0.37),
    "negative": -weight(2, 32).abs() - 1,
    "positive": weight(2, 32).abs() + 1,
    "outlier": torch.nn.functional.pad(weight(2, 31), (1, 0), value=1e6),
    "denormal": torch.full((2, 32), 1e-41),
    "huge": (torch.linspace(-3, 3, 64) * 1e37).reshape(2, 32),
    "two values": torch.tensor([[1.0, 2.0] * 16] * 2),
}


@pytest.mark.fault("S10")
@pytest.mark.fault("N8")
@pytest.mark.parametrize("name", DEGENERATE)
@pytest.mark.parametrize("bits", [2, 4])
def test_degenerate_rows_give_finite_grids_and_a_sensible_reconstruction(name: str, bits: int) -> None:
    w = DEGENERATE[name]
    found = [
        fit_minmax(w, bits),
        fit_minmax(w, bits, symmetric=True),
        fit_affine(w, ONES, bits, 64),
        fit_nonuniform(w, ONES, 2**bits),
    ]
    for each in found:
        again = each.dequantize(each.nearest(w))
        assert bool(again.isfinite().all())
        assert int(each.nearest(w).max()) < 2**bits
        assert float((again - w).double().norm()) <= 0.9 * float(w.double().norm()) + 1e-30
    if name in ("zeros", "constant", "two values"):
        assert torch.equal(found[-1].dequantize(found[-1].nearest(w)), w)
    if name == "zeros":
        assert all(not bool(each.dequantize(each.nearest(w)).any()) for each in found)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_with_their_number(bad: float) -> None:
    w = weight(3, 32)
    w[1, 5] = w[2, 7] = bad
    with pytest.raises(ShapeError, match="2 of 96 weights"):
        fit_minmax(w, 4)
    with pytest.raises(ShapeError, match="2 of 96 weights"):
        fit_affine(w, ONES)
    with pytest.raises(ShapeError, match="2 of 96 weights"):
        fit_nonuniform(w, ONES)


@pytest.mark.fault("S14")
@pytest.mark.parametrize("group_size", [5, 64, 0])
def test_a_group_that_does_not_divide_is_refused_with_both_numbers(group_size: int) -> None:
    for fit in (
        lambda: fit_minmax(weight(2, 32), 4, group_size),
        lambda: fit_affine(weight(2, 32), ONES, 4, 64, group_size),
    ):
        with pytest.raises(ShapeError, match=f"{group_size} columns do not divide 32"):
            fit()


@pytest.mark.fault("N11")
def test_grids_refuse_values_that_no_file_should_hold() -> None:
    one, zero = torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.uint8)
    for scale, offset in ((one * 0, one), (one, one * float("inf"))):
        with pytest.raises(ShapeError):
            OffsetGrid(scale, offset, 4)
    for scale, zero_point in ((one * 0, zero), (one * float("nan"), zero), (one, zero + 16)):
        with pytest.raises(ShapeError):
            AffineGrid(scale, zero_point, 4)
    for levels in (torch.tensor([[2.0, 1.0]]), torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0, float("inf")]])):
        with pytest.raises(ShapeError):
            NonuniformGrid(levels)
    with pytest.raises(ShapeError, match="33 columns"):
        fit_minmax(weight(2, 32), 4, 8).nearest(weight(2, 33))


def test_sums_by_code_are_the_same_in_both_orders() -> None:
    values, codes = torch.randn(5, 200), torch.randint(0, 8, (5, 200))
    codes[0] = 3  # codes without a column sum to 0
    expected = torch.zeros(5, 8, dtype=torch.float64).scatter_add_(1, codes, values.double())
    for found in (sum_by_code(values, codes, 8), sum_code_by_code(values, codes, 8)):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert sum_code_by_code(values, codes, 8)[0].count_nonzero() == 1

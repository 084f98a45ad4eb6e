"""llama.cpp's K types as grids: integers as brute force chooses them, exact products, and every block type through the
whole layer."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from math_problems import generator, hessian, layer, losses, weight

from leangrid.block_types import BLOCK_TYPES
from leangrid.errors import RecipeError, ShapeError
from leangrid.grids import (
    AffineGrid,
    Grid,
    KTypeGrid,
    OffsetGrid,
    Precision,
    fit_affine,
    fit_k_type,
    fit_minmax_k_type,
    fit_offset,
)
from leangrid.grids.k_types import Quadratic, _integers, _nearest
from leangrid.recipe import Recipe
from leangrid.schemes import Scheme
from leangrid.solve.factor import factorize
from leangrid.solve.layer import LinearResult, solve_linear
from leangrid.solve.refine import refine
from leangrid.solve.sweep import sweep

KINDS = [kind for kind in BLOCK_TYPES.values() if kind.sc]
NAMES = [kind.name for kind in KINDS]


def weighted(found: Grid, w: torch.Tensor, g: torch.Tensor) -> float:
    return float((g * (found.dequantize(found.nearest(w)) - w).double().square()).sum())


def literal(found: KTypeGrid, codes: torch.Tensor) -> torch.Tensor:
    """The type's formula in float64, number by number of the file."""
    kind, cols = found.block_type, codes.shape[1]
    d, dmin = (x.double().repeat_interleave(256, 1) for x in (found.d, found.dmin))
    sc, m = (x.double().repeat_interleave(kind.group, 1) for x in (found.sub_scale, found.sub_min))
    assert d.shape[1] == cols
    return d * sc * (codes.double() - kind.middle) - dmin * m


@pytest.mark.parametrize("name", NAMES)
def test_levels_are_the_types_formula_rounded_once(name: str) -> None:
    kind, w = BLOCK_TYPES[name], weight(6, 512)
    found = fit_k_type(w, torch.ones(512, dtype=torch.float64), kind)
    codes = torch.randint(0, 2**kind.bits, (6, 512), generator=generator(0), dtype=torch.uint8)
    assert torch.equal(found.dequantize(codes), literal(found, codes).float())
    assert torch.equal(
        (found.design(codes) * found.parameters.repeat_interleave(256, 1).transpose(1, 2)).sum(1),
        found.dequantize(codes),
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 1e3])
def test_the_fit_beats_min_max_and_stays_near_free_real_scales(name: str, magnitude: float) -> None:
    kind, w = BLOCK_TYPES[name], weight(12, 512) * magnitude
    g = torch.rand(512, generator=generator(1)).double() + 0.01
    found, minmax = fit_k_type(w, g, kind), fit_minmax_k_type(w, kind)
    free = (
        fit_offset(w, g, kind.bits, 256, kind.group)
        if kind.minimum
        else fit_affine(w, g, kind.bits, 256, kind.group, True)
    )
    assert weighted(found, w, g) < 0.95 * weighted(minmax, w, g)
    assert weighted(found, w, g) < 1.15 * weighted(free, w, g)


@given(seed=st.integers(0, 10_000), spread=st.sampled_from([0.5, 2.0, 8.0]), share=st.booleans())
def test_integers_are_those_of_brute_force(seed: int, spread: float, share: bool) -> None:
    """All 15 x 16 pairs of Q2_K tried for each of its 16 groups, codes, d and dmin given."""
    kind, random = BLOCK_TYPES["Q2_K"], generator(seed)
    codes = torch.randint(0, 4, (1, 1, 16, 16), generator=random).float()
    w = (codes + 0.3 * torch.randn(codes.shape, generator=random)) * 0.01 - 0.01 * spread * torch.rand(
        1, 1, 16, 1, generator=random
    )
    g = torch.rand(w.shape, generator=random) + 0.05 if share else torch.ones_like(w)
    error = Quadratic((g * codes * codes).sum(3), (g * codes).sum(3), g.sum(3), (g * codes * w).sum(3), (g * w).sum(3))
    d, dmin = torch.tensor([[0.001]]), torch.tensor([[0.0007 * spread]])
    found = _integers(error, error.best()[0].clamp(min=0), d, dmin, kind)
    every = [(sc, m) for sc in range(1, 16) for m in range(16)]
    costs = torch.stack(
        [error.at(torch.full_like(error.a, sc * 0.001), torch.full_like(error.a, -m) * dmin) for sc, m in every]
    )
    best = costs.amin(0)
    assert bool((found[2] <= best + 1e-4 * (best + (g * w * w).sum(3)).abs() + 1e-9).all())


@given(seed=st.integers(0, 10_000))
def test_signed_sub_scales_are_those_of_brute_force(seed: int) -> None:
    kind, random = BLOCK_TYPES["Q3_K"], generator(seed)
    unit, w = (torch.randn(1, 1, 16, 16, generator=random) for _ in range(2))
    a, s = (unit * unit).sum(3), (unit * w).sum(3)
    error = Quadratic(a, a * 0, a * 0, s, a * 0)
    d = torch.tensor([[0.03]])
    found = _nearest(error.best()[0], d, kind)
    costs = torch.stack([error.at(torch.full_like(a, sc * 0.03), a * 0) for sc in range(-32, 32) if sc])
    torch.testing.assert_close(error.at(found * 0.03, a * 0), costs.amin(0), rtol=1e-4, atol=1e-6)


DEGENERATE = {
    "zeros": torch.zeros(2, 256),
    "constant": torch.full((2, 256), 0.37),
    "negative": -weight(2, 256).abs() - 1,
    "outlier": torch.nn.functional.pad(weight(2, 255), (1, 0), value=1e3),
    "one group": torch.nn.functional.pad(weight(2, 16), (0, 240)),
    "denormal": torch.full((2, 256), 1e-41),
    "huge": weight(2, 256) * 1e9,
}


@pytest.mark.parametrize("case", DEGENERATE)
@pytest.mark.parametrize("name", NAMES)
def test_degenerate_blocks_give_finite_grids(name: str, case: str) -> None:
    kind, w = BLOCK_TYPES[name], DEGENERATE[case]
    for found in (fit_minmax_k_type(w, kind), fit_k_type(w, torch.ones(256, dtype=torch.float64), kind)):
        again = found.dequantize(found.nearest(w))
        assert bool(again.isfinite().all())
        assert float((again - w).double().norm()) <= float(w.double().norm()) + 1e-30
        if case == "zeros":
            assert not bool(again.any())


def test_what_no_file_could_hold_is_refused() -> None:
    found = fit_k_type(weight(2, 256), torch.ones(256, dtype=torch.float64), BLOCK_TYPES["Q4_K"])
    one = torch.ones_like(found.sub_scale)
    for changed in ({"sub_scale": one * 64}, {"sub_scale": one * 0}, {"sub_min": one * -1}, {"d": found.d * 1.0001}):
        given_ = {name: getattr(found, name) for name in ("block_type", "d", "dmin", "sub_scale", "sub_min")} | changed
        with pytest.raises(ShapeError):
            KTypeGrid(**given_)
    with pytest.raises(ShapeError, match="256 columns do not divide 320"):
        fit_k_type(weight(2, 320), torch.ones(320, dtype=torch.float64), BLOCK_TYPES["Q4_K"])


@pytest.mark.parametrize("name", NAMES)
def test_refits_keep_the_integers_and_lower_the_loss(name: str) -> None:
    w, _, factor = layer(5, 512)
    found = fit_k_type(w, factor.loss_error_weights(2.0), BLOCK_TYPES[name])
    codes = sweep(w, factor, found).codes
    result = refine(w, codes, found, factor.damped, 1, Precision(torch.float16))
    old, new = (losses(g.dequantize(c), w, factor.damped) for c, g in ((codes, found), (result.codes, result.grid)))
    assert bool((new <= old * (1 + 1e-4)).all())
    assert float(new.sum()) < 0.99 * float(old.sum())
    assert torch.equal(result.grid.sub_scale, found.sub_scale) and torch.equal(result.grid.sub_min, found.sub_min)
    assert torch.equal(result.grid.d.half().float(), result.grid.d)
    assert not torch.equal(result.grid.d, found.d)


def solve(scheme: str, cols: int) -> LinearResult:
    w, matrix = weight(8, cols), hessian(cols)
    return solve_linear(w, factorize(matrix), matrix, Recipe(scheme=scheme).resolved(), Precision(torch.bfloat16))


@pytest.mark.parametrize("scheme", sorted(BLOCK_TYPES))
def test_every_block_type_beats_its_own_baselines(scheme: str) -> None:
    result, kind = solve(scheme, 512), BLOCK_TYPES[scheme]
    assert result.loss < result.loss_minmax < result.loss_rounding
    assert result.grid.bits == kind.bits and not result.rescues
    expected = KTypeGrid if kind.sc else OffsetGrid if kind.minimum else AffineGrid
    assert type(result.grid) is expected
    parameters = (
        [result.grid.parameters]
        if isinstance(result.grid, KTypeGrid)
        else [result.grid.scale, getattr(result.grid, "offset", None)]
    )
    assert all(
        torch.equal(x.half().float(), x) for x in parameters if x is not None
    )  # float16 whatever the checkpoint's dtype
    for name in ("RTN", "GPTQ"):
        baseline = solve(f"{name}_{scheme}", 512)
        assert baseline.loss == pytest.approx(result.loss_rounding if name == "RTN" else result.loss_minmax)


def test_narrow_layers_take_the_type_of_32_columns_and_say_so() -> None:
    recipe = Recipe(scheme="q4_k").resolved()
    assert (recipe.scheme, recipe.format) == ("Q4_K", "gguf")
    assert (recipe.scheme_for(1536).grid, recipe.scheme_name(1536)) == ("superblock", "Q4_K")
    assert (recipe.scheme_for(576).grid, recipe.scheme_name(576)) == ("offset", "Q4_1")
    assert Recipe(scheme="GPTQ_Q6_K").scheme_name(576) == "GPTQ_Q8_0"
    assert Recipe(scheme="W4A16_G64").scheme_name(576) == "W4A16_G64"
    for kind in KINDS:
        assert BLOCK_TYPES[kind.narrow or ""].bits >= kind.bits
        assert Scheme.parse(kind.name).fitting(512).block == kind.name
    assert isinstance(solve("Q4_K", 96).grid, OffsetGrid)
    with pytest.raises(RecipeError, match="not a scheme"):
        Scheme.parse("Q4_2")


def test_the_format_decides_where_the_offset_lies() -> None:
    assert Recipe(scheme="W4A16_G64", format="mlx").parsed.grid == "offset"
    assert Recipe(scheme="W4A16_G64_SYM", format="mlx").parsed.grid == "affine"
    assert Recipe(scheme="W4A16_G64").resolved().parsed.grid == "affine"

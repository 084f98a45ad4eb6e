"""The algebra in place against the plain one: the same factor, correction and codes, in a third of the memory."""

import pytest
import torch
from live_bytes import LiveBytes

from leangrid.errors import CalibrationError, NumericalError
from leangrid.recipe import Recipe
from leangrid.solve import hessian, in_place
from leangrid.solve.correction import Correction, correct, multiply_by_inverse
from leangrid.solve.factor import factorize
from leangrid.solve.hessian import HessianSum
from leangrid.solve.in_place import (
    InPlaceGroup,
    InPlaceHessianSum,
    cholesky_,
    concatenate_results,
    factorize_in_place,
    invert_lower_,
    reverse_,
)
from leangrid.solve.layer import LinearResult, solve_linear


def in_tiles(group: InPlaceGroup, name: str, recipe: Recipe, tile: int) -> LinearResult:
    """One linear of the group, solved ``tile`` rows at a time."""
    factor, matrix = group.factor, group.hessian.matrix
    return concatenate_results([solve_linear(target, factor, matrix, recipe) for target in group.targets(name, tile)])


def _inputs(cols: int, tokens: int = 400, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs of both streams with an outlier column, correlated as activations are."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(cols) + 0.3 * torch.randn(cols, cols, generator=generator) / cols**0.5
    original = torch.randn(tokens, cols, generator=generator) @ mix
    original[:, 3] *= 20
    return original, original + 0.1 * torch.randn(tokens, cols, generator=generator)


def _sum(kind: type[HessianSum], cols: int, cross: bool = True, halves: bool = False) -> HessianSum:
    original, quantized = _inputs(cols)
    if halves:  # the difference is noise, and a little that follows from the inputs
        original, quantized = quantized + 0.01 * original.roll(1, dims=1), original
    total = kind(cols, cross=cross, halves=halves)
    for part in (slice(0, 150), slice(150, 400)):
        total.begin_half(part.start == 0)
        if cross:
            total.add_pair(original[part], quantized[part])
        else:
            total.add(quantized[part])
    return total


def _spd(cols: int) -> torch.Tensor:
    return _sum(HessianSum, cols, cross=False).finish().matrix


@pytest.mark.parametrize(("cross", "halves"), [(False, False), (True, False), (True, True)])
def test_a_sum_finished_in_place_is_the_plain_one_bit_for_bit(cross: bool, halves: bool) -> None:
    plain, wide = _sum(HessianSum, 70, cross, halves).finish(), _sum(InPlaceHessianSum, 70, cross, halves).finish()
    assert torch.equal(plain.matrix, wide.matrix) and (plain.tokens, plain.dropped) == (wide.tokens, wide.dropped)
    assert (plain.cross is None) == (wide.cross is None) == (not cross)
    if plain.cross is not None and wide.cross is not None:
        assert torch.equal(plain.cross, wide.cross)
    assert (plain.noise is None) == (wide.noise is None) == (not halves)
    if plain.noise is not None and wide.noise is not None:
        assert torch.equal(plain.noise, wide.noise)


def test_a_sum_in_place_refuses_what_the_plain_one_refuses() -> None:
    with pytest.raises(CalibrationError, match="no calibration tokens"):
        InPlaceHessianSum(4).finish()
    broken = InPlaceHessianSum(4)
    broken.add(torch.full((10, 4), float("nan")))
    with pytest.raises(NumericalError, match="NaN or infinite"):
        broken.finish()
    huge = InPlaceHessianSum(4)
    for _ in range(3):
        huge.add(torch.tensor([[1.5e19, 0.0, 0.0, 0.0]]))
    with pytest.raises(NumericalError, match="overflows"):
        huge.finish()


@pytest.mark.parametrize("panel", [1, 7, 16, 64, 100])
def test_in_place_steps_are_the_textbook_ones(panel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hessian, "MIRROR_PANEL", panel)
    matrix = _spd(64).double()
    half = torch.triu(matrix)
    assert torch.equal(hessian.mirror_(half.clone()), matrix)
    lower = matrix.clone()
    lower += torch.triu(torch.full_like(lower, 9.0), 1)  # only the lower triangle is read
    assert cholesky_(lower, panel)
    expected = torch.linalg.cholesky(matrix)
    torch.testing.assert_close(lower, expected)
    torch.testing.assert_close(invert_lower_(lower, panel), torch.linalg.inv(expected))
    assert not cholesky_(-matrix, panel)


@pytest.mark.parametrize("chunk", [1, 5, 1000])
@pytest.mark.parametrize("size", [1, 4, 7])
def test_reversing_in_place(size: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_place, "REVERSED_AT_ONCE", chunk)
    matrix = torch.arange(size * size, dtype=torch.float32).reshape(size, size)
    assert torch.equal(reverse_(matrix.clone()), matrix.flip(0, 1))


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("panel", [13, 96])
def test_factor_in_place_is_the_plain_factor(act_order: bool, panel: int) -> None:
    matrix = _spd(96) * 3e4
    matrix[5], matrix[:, 5] = 0, 0  # a dead column
    plain, wide = factorize(matrix.clone(), 0.01, act_order), factorize_in_place(matrix, 0.01, act_order, panel)
    assert torch.equal(plain.order, wide.order) and torch.equal(plain.dead, wide.dead) and plain.rescues == wide.rescues
    assert torch.equal(plain.damped, wide.damped) and plain.damping == wide.damping
    torch.testing.assert_close(plain.upper, wide.upper, rtol=1e-4, atol=1e-5 * float(plain.upper.max()))
    rows = torch.randn(4, 96)
    torch.testing.assert_close(
        multiply_by_inverse(wide, rows),
        torch.linalg.solve(plain.damped.double(), rows.double().T).T.float(),
        rtol=1e-3,
        atol=1e-7,
    )


@pytest.mark.fault("N5")
def test_what_cannot_be_factored_is_rescued_as_in_the_plain_function() -> None:
    matrix = torch.eye(32)
    matrix[0, 1] = matrix[1, 0] = 1.05  # positive definite with 0.1 of damping, not with 0.01
    plain, wide = factorize(matrix.clone()), factorize_in_place(matrix)
    assert (
        [r.kind for r in plain.rescues] == ["damping"]
        and plain.rescues == wide.rescues
        and plain.damping == wide.damping
    )
    assert torch.equal(plain.upper, wide.upper)
    nothing = factorize_in_place(torch.zeros(8, 8))
    assert torch.equal(nothing.upper, factorize(torch.zeros(8, 8)).upper) and bool(nothing.dead.all())


@pytest.mark.parametrize("scheme", ["NU3", "W4A16_G16", "GPTQ4"])
@pytest.mark.parametrize("rows", [(20, 30), (90,)])  # fewer rows than columns: W (G - H) comes first; more: M
@pytest.mark.parametrize("strength", [0.5, None])  # None: measured
def test_a_group_gives_the_plain_path_s_codes(scheme: str, rows: tuple[int, ...], strength: float | None) -> None:
    cols, recipe = 64, Recipe(scheme=scheme).resolved()
    generator = torch.Generator().manual_seed(1)
    weights = {f"linear{i}": torch.randn(count, cols, generator=generator) for i, count in enumerate(rows)}
    cross, strength = (False, 0.0) if scheme == "GPTQ4" else (True, strength)
    hessian = _sum(HessianSum, cols, cross, strength is None).finish()
    factor = factorize(hessian.matrix)
    wide = InPlaceGroup(_sum(InPlaceHessianSum, cols, cross, strength is None), weights, recipe, strength, panel=24)
    for name, weight in weights.items():
        correction = None
        if hessian.cross is not None:
            correction = Correction.of(hessian.matrix, hessian.cross, factor, sum(rows), hessian.noise)
        target, share = correct(weight, correction, strength)
        assert wide.shares[name] == pytest.approx(share, abs=1e-4)
        assert (0.01 < share < 0.49) == (strength is None and cross)
        plain, ours = solve_linear(target, factor, hessian.matrix, recipe), in_tiles(wide, name, recipe, 17)
        assert (plain.codes == ours.codes).float().mean() > 0.999
        torch.testing.assert_close(plain.grid.levels, ours.grid.levels, rtol=1e-3, atol=1e-4)
        for loss in ("loss", "loss_minmax", "loss_rounding"):
            assert getattr(ours, loss) == pytest.approx(getattr(plain, loss), rel=1e-3)


@pytest.mark.parametrize("strength", [0.5, None])
def test_three_matrices_at_once(strength: float | None) -> None:
    cols, recipe = 1024, Recipe(scheme="W4A16_G64", guard=False).resolved()
    original, quantized = _inputs(cols, 1024)
    weights = {"down": torch.randn(64, cols)}
    with LiveBytes() as alive:
        total = InPlaceHessianSum(cols, cross=True, halves=strength is None)
        for first in (True, False):
            total.begin_half(first)
            part = slice(0, 512) if first else slice(512, None)
            total.add_pair(original[part], quantized[part])
        before = alive.now
        alive.peak = 0
        group = InPlaceGroup(total, weights, recipe, strength, panel=64)
        result = in_tiles(group, "down", recipe, 16)
    square = 4 * cols * cols
    assert before >= (2 + (strength is None)) * square and alive.peak < 3.6 * square
    assert result.codes.shape == (64, cols)

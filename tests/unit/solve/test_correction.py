"""The corrected target against the least-squares problem that it solves, and its share against halves of the tokens."""

import pytest
import torch
from math_problems import generator, inputs, weight
from reference import reference_share

from leangrid.solve import hessian
from leangrid.solve.correction import LARGEST, Correction, correct
from leangrid.solve.factor import factorize
from leangrid.solve.hessian import HessianSum


def correction(matrix: torch.Tensor, cross: torch.Tensor | None, damping: float = 0.01, rows: int = 1) -> Correction:
    assert cross is not None
    return Correction.of(matrix, cross, factorize(matrix, damping), rows)


def streams(cols: int = 10, tokens: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    x = inputs(tokens, cols)
    return x, x + 0.1 * torch.randn(tokens, cols, generator=generator(7)) + 0.05 * x.roll(1, dims=1)


def test_full_strength_without_damping_is_the_least_squares_target() -> None:
    x, y = streams()
    total, w = HessianSum(10, cross=True), weight(6, 10)
    total.add_pair(x, y)
    found = total.finish()
    target, _ = correct(w, correction(found.matrix, found.cross, damping=1e-9), 1.0)
    solution = torch.linalg.lstsq(y.double(), x.double() @ w.double().T).solution.T
    torch.testing.assert_close(target.double(), solution, rtol=1e-3, atol=1e-5)
    half = correct(w, correction(found.matrix, found.cross), 0.5)[0]
    error = [(x @ w.T - y @ t.float().T).norm() for t in (w, half, target)]
    assert error[2] < error[1] < error[0]


def test_equal_streams_need_no_correction() -> None:
    total = HessianSum(8, cross=True)
    total.add(inputs(50, 8))
    found, w = total.finish(), weight(3, 8)
    torch.testing.assert_close(correct(w, correction(found.matrix, found.cross), 1.0)[0], w, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("strength", [0.25, 1.0])
def test_by_rows_or_once_for_the_group_is_the_same_and_the_damped_inverse(strength: float) -> None:
    x, y = streams()
    total, w = HessianSum(10, cross=True), weight(6, 10)
    total.add_pair(x, y)
    found = total.finish()
    assert found.cross is not None
    few, many = (correction(found.matrix, found.cross, rows=rows) for rows in (9, 10))
    assert not few.solved
    assert many.solved
    damped = found.matrix.double() + 0.01 * found.matrix.diagonal().double().mean() * torch.eye(10)
    exact = w.double() + strength * w.double() @ (found.cross.double() - found.matrix.double()) @ torch.linalg.inv(
        damped
    )
    for one in (few, many):
        target, share = correct(w, one, strength)
        torch.testing.assert_close(target.double(), exact, rtol=1e-4, atol=1e-6)
        assert share == strength


def test_strength_zero_or_no_correction_returns_the_weights() -> None:
    w = weight(3, 8)
    broken = Correction(torch.full((8, 8), float("inf")), factorize(torch.eye(8)), True)
    for correction_, strength in ((broken, 0.0), (None, 1.0), (None, None)):
        target, share = correct(w, correction_, strength)
        assert torch.equal(target, w)
        assert share == 0


def test_dead_columns_and_no_input_at_all() -> None:
    x, y = streams()
    y[:, 4] = 0
    total, w = HessianSum(10, cross=True), weight(6, 10)
    total.add_pair(x, y)
    found = total.finish()
    shift = correction(found.matrix, found.cross).correction_of(w)
    assert bool(shift.isfinite().all())
    assert float(shift[:, 4].abs().max()) < 1e-6  # nothing can be corrected through a column that is always 0
    assert not bool(correction(torch.zeros(4, 4), torch.zeros(4, 4)).correction_of(weight(2, 4)).any())


def noisy_streams(tokens: int, common: float, cols: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs of both models: the quantized one's are off by noise, which no weight can correct, and, times ``common``,
    by what follows from them."""
    y, drawn = inputs(tokens, cols), generator(3)
    follows = torch.randn(cols, cols, generator=drawn) / cols**0.5
    return y + 0.3 * torch.randn(tokens, cols, generator=drawn) + common * y @ follows, y


def summed(x: torch.Tensor, y: torch.Tensor, batches: list[tuple[bool, int]]) -> HessianSum:
    """The sums over batches of (first half, tokens), one after another."""
    total, start = HessianSum(x.shape[1], cross=True, halves=True), 0
    for first, count in batches:
        total.begin_half(first)
        total.add_pair(x[start : start + count], y[start : start + count])
        start += count
    assert start == len(x)
    return total


@pytest.mark.parametrize("rows", [6, 40])  # fewer than columns, and more
@pytest.mark.parametrize("common", [0.0, 0.02, 0.05, 0.5])
@pytest.mark.parametrize("batches", [
    [(True, 60), (False, 60)],
    [(True, 20), (True, 20), (False, 80)],
    [(False, 30), (True, 50), (False, 10), (True, 30)],
])  # fmt: skip
def test_the_measured_share_is_that_of_the_slow_twin(
    rows: int, common: float, batches: list[tuple[bool, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hessian, "MIRROR_PANEL", 7)
    (x, y), w = noisy_streams(120, common), weight(rows, 24)
    found = summed(x, y, batches).finish()
    assert found.cross is not None
    assert found.noise is not None
    factor = factorize(found.matrix)
    one = Correction.of(found.matrix, found.cross, factor, rows, found.noise)
    assert one.solved == (rows >= 24)
    target, share = correct(w, one, None)
    first = torch.cat([torch.full((count,), half) for half, count in batches])
    assert share == pytest.approx(reference_share(w, x, y, first, damping=0.01), abs=2e-4)
    plain = Correction.of(found.matrix, found.cross, factor, rows)
    torch.testing.assert_close(target, correct(w, plain, share)[0], rtol=1e-4, atol=1e-6)


def test_the_share_grows_with_what_both_halves_agree_on_and_ends_at_the_largest() -> None:
    shares, w = [], weight(30, 24)
    for common in (0.0, 0.05, 0.1, 2.0):
        x, y = noisy_streams(120, common)
        found = summed(x, y, [(True, 60), (False, 60)]).finish()
        assert found.cross is not None
        one = Correction.of(found.matrix, found.cross, factorize(found.matrix), 30, found.noise)
        shares.append(correct(w, one, None)[1])
    assert shares == sorted(shares)
    assert shares[0] < 0.3 < LARGEST == shares[-1]


def test_the_halves_change_neither_the_hessian_nor_the_cross_term() -> None:
    x, y = noisy_streams(120, 0.1)
    plain = HessianSum(24, cross=True)
    plain.add_pair(x[:60], y[:60])
    plain.add_pair(x[60:], y[60:])
    one, other = plain.finish(), summed(x, y, [(True, 60), (False, 60)]).finish()
    assert one.noise is None
    assert torch.equal(one.matrix, other.matrix)
    assert one.cross is not None
    assert other.cross is not None
    assert torch.equal(one.cross, other.cross)


def test_streams_that_never_differed_have_no_correction_to_measure() -> None:
    x, _ = noisy_streams(40, 0.0)
    found = summed(x, x.clone(), [(True, 20), (False, 20)]).finish()
    assert found.cross is None
    assert found.noise is None


@pytest.mark.parametrize("half", [True, False])
def test_all_tokens_in_one_half_leave_the_largest_share(half: bool) -> None:
    (x, y), w = noisy_streams(40, 0.2), weight(5, 24)
    found = summed(x, y, [(half, 40)]).finish()
    assert found.noise is None
    assert found.cross is not None
    one = Correction.of(found.matrix, found.cross, factorize(found.matrix), 5, found.noise)
    target, share = correct(w, one, None)
    assert share == LARGEST
    assert torch.equal(target, correct(w, one, LARGEST)[0])


def test_tokens_that_are_dropped_are_in_no_half() -> None:
    (x, y), w = noisy_streams(120, 0.05), weight(6, 24)
    y[5], x[70] = float("nan"), float("inf")
    kept = torch.ones(120, dtype=torch.bool).index_fill_(0, torch.tensor([5, 70]), False)
    found = summed(x, y, [(True, 50), (False, 70)]).finish()
    assert (found.tokens, found.dropped) == (118, 2)
    assert found.cross is not None
    one = Correction.of(found.matrix, found.cross, factorize(found.matrix), 6, found.noise)
    first = (torch.arange(120) < 50)[kept]
    expected = reference_share(w, x[kept], y[kept], first, damping=0.01)
    assert correct(w, one, None)[1] == pytest.approx(expected, abs=2e-4)

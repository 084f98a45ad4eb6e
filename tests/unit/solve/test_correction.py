"""The corrected target against the least-squares problem that it solves."""

import pytest
import torch
from math_problems import generator, inputs, weight

from leangrid.solve.correction import Correction, correct
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
    target = correct(w, correction(found.matrix, found.cross, damping=1e-9), 1.0)
    solution = torch.linalg.lstsq(y.double(), x.double() @ w.double().T).solution.T
    torch.testing.assert_close(target.double(), solution, rtol=1e-3, atol=1e-5)
    error = [
        (x @ w.T - y @ t.float().T).norm() for t in (w, correct(w, correction(found.matrix, found.cross), 0.5), target)
    ]
    assert error[2] < error[1] < error[0]


def test_equal_streams_need_no_correction() -> None:
    total = HessianSum(8, cross=True)
    total.add(inputs(50, 8))
    found, w = total.finish(), weight(3, 8)
    torch.testing.assert_close(correct(w, correction(found.matrix, found.cross), 1.0), w, rtol=1e-4, atol=1e-7)


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
        torch.testing.assert_close(correct(w, one, strength).double(), exact, rtol=1e-4, atol=1e-6)


def test_strength_zero_or_no_correction_returns_the_weights() -> None:
    w = weight(3, 8)
    broken = Correction(torch.full((8, 8), float("inf")), factorize(torch.eye(8)), True)
    assert torch.equal(correct(w, broken, 0.0), w)
    assert torch.equal(correct(w, None, 1.0), w)


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

"""The corrected target against the least-squares problem that it solves."""

import pytest
import torch

from leangrid.correction import correct, correction_matrix
from leangrid.errors import NumericalError
from leangrid.hessian import HessianSum
from math_problems import generator, inputs, weight


def streams(cols: int = 10, tokens: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    x = inputs(tokens, cols)
    return x, x + 0.1 * torch.randn(tokens, cols, generator=generator(7)) + 0.05 * x.roll(1, dims=1)


def test_full_strength_without_damping_is_the_least_squares_target() -> None:
    x, y = streams()
    total, w = HessianSum(10, cross=True), weight(6, 10)
    total.add_pair(x, y)
    found = total.finish()
    assert found.cross is not None
    target = correct(w, correction_matrix(found.matrix, found.cross, damping=1e-9), 1.0)
    solution = torch.linalg.lstsq(y.double(), x.double() @ w.double().T).solution.T
    torch.testing.assert_close(target.double(), solution, rtol=1e-3, atol=1e-5)
    error = [(x @ w.T - y @ t.float().T).norm() for t in (w, correct(w, correction_matrix(found.matrix, found.cross), 0.5), target)]
    assert error[2] < error[1] < error[0]


def test_equal_streams_need_no_correction() -> None:
    total = HessianSum(8, cross=True)
    total.add(inputs(50, 8))
    found, w = total.finish(), weight(3, 8)
    assert found.cross is not None
    torch.testing.assert_close(correct(w, correction_matrix(found.matrix, found.cross), 1.0), w, rtol=1e-4, atol=1e-7)


def test_strength_zero_returns_the_weights() -> None:
    w = weight(3, 8)
    assert torch.equal(correct(w, torch.full((8, 8), float("inf")), 0.0), w)


def test_dead_columns_and_no_input_at_all() -> None:
    x, y = streams()
    y[:, 4] = 0
    total = HessianSum(10, cross=True)
    total.add_pair(x, y)
    found = total.finish()
    assert found.cross is not None
    matrix = correction_matrix(found.matrix, found.cross)
    assert bool(matrix.isfinite().all())
    assert float(matrix[:, 4].abs().max()) < 1e-6  # nothing can be corrected through a column that is always 0
    assert not bool(correction_matrix(torch.zeros(4, 4), torch.zeros(4, 4)).any())


@pytest.mark.parametrize("bad", [-torch.eye(4), torch.full((4, 4), float("nan"))])
def test_an_unusable_hessian_is_an_error(bad: torch.Tensor) -> None:
    with pytest.raises(NumericalError):
        correction_matrix(bad, torch.eye(4))

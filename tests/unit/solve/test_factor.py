"""The damped inverse Cholesky factor, its order, and every rescue of it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from math_problems import generator, hessian, inputs, spd

from leangrid.errors import NumericalError
from leangrid.solve.factor import factorize, invert_triangular_, split_cholesky_


def identity_error(matrix: torch.Tensor, damping: float, act_order: bool = True) -> float:
    factor = factorize(matrix, damping, act_order)
    damped = matrix.double() + factor.damping * matrix.diagonal().double().mean() * torch.eye(len(matrix))
    torch.testing.assert_close(factor.damped.double(), damped, rtol=1e-5, atol=1e-6 * float(damped.abs().max()))
    assert torch.equal(factor.upper, factor.upper.triu())
    permuted = damped[factor.order][:, factor.order]
    return float((factor.upper.double().T @ factor.upper.double() @ permuted - torch.eye(len(matrix))).abs().max())


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("cols", [1, 2, 33, 150])
def test_the_factor_inverts_the_damped_hessian_in_elimination_order(cols: int, act_order: bool) -> None:
    matrix = hessian(cols)
    factor = factorize(matrix, act_order=act_order)
    assert factor.rescues == ()
    assert identity_error(matrix, 0.01, act_order) < 1e-4
    expected = torch.argsort(matrix.diagonal(), descending=True, stable=True) if act_order else torch.arange(cols)
    assert torch.equal(factor.order, expected)
    assert torch.equal(factor.diagonal[factor.order], factor.upper.diagonal().double())
    torch.testing.assert_close(factor.inverse(), torch.linalg.inv(factor.damped.double()), rtol=1e-3, atol=1e-5)


@given(
    cols=st.integers(1, 24),
    exponent=st.floats(0, 16),
    damping=st.sampled_from([1e-3, 1e-2, 0.1]),
    seed=st.integers(0, 999),
)
def test_any_spectrum_factors_without_a_rescue_at_sane_damping(
    cols: int, exponent: float, damping: float, seed: int
) -> None:
    matrix = spd(cols, 10**exponent, seed)
    assert factorize(matrix, damping).rescues == ()
    assert identity_error(matrix, damping) < 1e-2


@pytest.mark.fault("N5")
@given(exponent=st.floats(0, 16), damping=st.floats(1e-12, 1e-4), seed=st.integers(0, 999))
def test_any_spectrum_gives_a_checked_factor_or_a_record(exponent: float, damping: float, seed: int) -> None:
    matrix = spd(16, 10**exponent, seed)
    factor = factorize(matrix, damping)
    assert bool(factor.upper.isfinite().all())
    kinds = [rescue.kind for rescue in factor.rescues]
    assert (factor.damping == damping) == ("damping" not in kinds)
    if "diagonal" not in kinds:
        exact = factor.damped.double()
        error = factor.inverse() @ exact - torch.eye(16, dtype=torch.float64)
        assert float(error.norm()) / 4 < 0.1 * max(1.0, float(torch.linalg.cond(exact)) * 1e-6)


@pytest.mark.fault("N5")
def test_fewer_tokens_than_columns() -> None:
    x = inputs(5, 60)
    assert identity_error(2 / 5 * x.T @ x, 0.01) < 1e-2


@pytest.mark.fault("N5")
@pytest.mark.parametrize(("smallest", "kind"), [(-0.05, "damping"), (-0.5, "damping"), (-5.0, "diagonal")])
def test_an_indefinite_hessian_is_rescued_and_recorded(smallest: float, kind: str) -> None:
    basis = torch.linalg.qr(torch.randn(20, 20, generator=generator(0))).Q
    eigenvalues = torch.linspace(1, 2, 20)
    eigenvalues[0] = smallest * float(eigenvalues[1:].mean())
    matrix = basis * eigenvalues @ basis.T
    factor = factorize((matrix + matrix.T) / 2, 0.01)
    assert [rescue.kind for rescue in factor.rescues] == [kind]
    assert not factor.rescues[0].is_note
    assert bool(factor.upper.isfinite().all())
    if kind == "damping":
        assert factor.damping in (0.1, 1.0)
    else:
        assert torch.equal(factor.damped, torch.diag(factor.damped.diagonal()))


@pytest.mark.fault("N5")
def test_float64_is_recorded_when_float32_is_not_enough() -> None:
    lower = torch.eye(12, dtype=torch.float64) - torch.ones(12, 12, dtype=torch.float64).tril(-1)
    matrix = lower @ lower.T  # integers, exact in float32; its condition is about 2^24
    factor = factorize(matrix.float(), 1e-13)
    assert [rescue.kind for rescue in factor.rescues] == ["float64"]
    torch.testing.assert_close(factor.inverse(), torch.linalg.inv(matrix), rtol=1e-3, atol=1e-3)


@pytest.mark.fault("N4")
def test_dead_columns_are_noted_go_last_and_weigh_least() -> None:
    x = inputs(100, 20)
    x[:, [3, 11]] = 0
    factor = factorize(2 / 100 * x.T @ x)
    assert [(r.kind, r.count, r.is_note) for r in factor.rescues] == [("dead_columns", 2, True)]
    assert factor.dead.nonzero().squeeze(1).tolist() == [3, 11]
    assert sorted(factor.order[-2:].tolist()) == [3, 11]
    weights = factor.loss_error_weights(4.0)
    assert bool(weights.isfinite().all())
    assert float(weights[[3, 11]].max()) <= float(weights[~factor.dead].min())
    everything_dead = factorize(torch.zeros(5, 5))
    assert torch.equal(everything_dead.damped, torch.diag(everything_dead.damped.diagonal()))
    assert bool((everything_dead.loss_error_weights(2.0) == 1).all())


@pytest.mark.parametrize("scale", [2.0**-60, 2.0**-9, 2.0**60])
def test_the_scale_of_the_hessian_changes_only_the_scale_of_the_factor(scale: float) -> None:
    matrix = hessian(30)
    one, other = factorize(matrix), factorize(matrix * scale)
    assert torch.equal(one.order, other.order)
    torch.testing.assert_close(one.upper, other.upper * scale**0.5, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(one.loss_error_weights(4.0), other.loss_error_weights(4.0), rtol=1e-4, atol=1e-5)


def test_loss_error_weights_follow_the_cholesky_diagonal() -> None:
    factor = factorize(hessian(15))
    ratio = factor.loss_error_weights(3.0) / factor.diagonal.pow(-3)
    torch.testing.assert_close(ratio, ratio[:1].expand(15))
    assert float(factor.loss_error_weights(16.0).max()) == 1
    assert bool((factor.loss_error_weights(0.0) == 1).all())


@pytest.mark.fault("N14")
@pytest.mark.parametrize("cols", [1, 33, 64, 65, 200, 333, 900])
def test_the_factor_knows_no_threads(cols: int) -> None:
    matrix, before, found = spd(cols, 1e3), torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(factorize(matrix).upper)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("cols", [1, 63, 64, 65, 200, 333])
def test_the_split_factorization_is_lapacks(cols: int) -> None:
    matrix = spd(cols, 1e3)
    found = matrix.clone()
    assert split_cholesky_(found)
    torch.testing.assert_close(found, torch.linalg.cholesky(matrix.double()).float(), rtol=1e-3, atol=1e-4)
    matrix[cols // 2, cols // 2] = -1.0
    assert not split_cholesky_(matrix)


@pytest.mark.parametrize("cols", [1, 64, 256, 320, 577, 832])
def test_a_triangle_is_inverted_by_halves(cols: int) -> None:
    lower = torch.linalg.cholesky(spd(cols, 1e4, 0).double() if cols > 1 else torch.tensor([[4.0]]).double())
    found = invert_triangular_(lower.float())
    expected = torch.linalg.inv(lower)
    assert torch.equal(found, found.tril())
    assert float((found.double() - expected).norm() / expected.norm()) < 1e-5
    exact = invert_triangular_(lower.clone())
    assert float((exact - expected).norm() / expected.norm()) < 1e-13


def test_what_is_above_the_diagonal_is_not_read() -> None:
    matrix = spd(640, 1e3, 0)
    one, other = matrix.clone(), matrix.tril() + torch.full_like(matrix, 7.0).triu(1)
    assert split_cholesky_(one)
    assert split_cholesky_(other)
    assert torch.equal(one, other)


def test_what_cannot_be_factored_is_refused() -> None:
    bad = hessian(4)
    bad[1, 2] = float("nan")
    with pytest.raises(NumericalError, match="NaN"):
        factorize(bad)

"""HessianSum against explicit float64 products: batches, streams, bad tokens."""

import pytest
import torch
from math_problems import generator, inputs

from leangrid.errors import CalibrationError, NumericalError, ShapeError
from leangrid.solve.hessian import HessianSum


def explicit(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return 2 / len(x) * x.double().T @ y.double()


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-6 * b.abs().max())


@pytest.mark.fault("N3")
@pytest.mark.parametrize("shape", [(60, 7), (3, 20, 7), (2, 3, 10, 7), (1, 60, 7)])
def test_any_leading_shape_counts_every_token(shape: tuple[int, ...]) -> None:
    x = inputs(60, 7)
    total = HessianSum(7)
    total.add(x.reshape(shape))
    found = total.finish()
    assert found.tokens == 60
    assert found.cross is None
    assert close(found.matrix, explicit(x, x))


@pytest.mark.fault("N12")
@pytest.mark.parametrize("cols", [1, 33, 700])  # 700: more than one panel of columns
def test_splitting_and_permuting_batches_changes_nothing(cols: int) -> None:
    x, y = inputs(90, cols), inputs(90, cols, seed=5)
    whole = HessianSum(cols, cross=True)
    whole.add_pair(x, y)
    parts = HessianSum(cols, cross=True)
    order = torch.randperm(90, generator=generator(3))
    for part in order.split(17):
        parts.add_pair(x[part], y[part])
    parts.add_pair(x[:0], y[:0])  # a batch without tokens, as an expert may get
    one, many = whole.finish(), parts.finish()
    assert one.cross is not None
    assert many.cross is not None
    assert one.tokens == many.tokens == 90
    assert close(one.matrix, many.matrix)
    assert close(one.cross, many.cross)
    assert close(one.matrix, explicit(y, y))  # the quantized stream decides H
    assert close(one.cross, explicit(x, y))
    assert torch.equal(one.matrix, one.matrix.T)


@pytest.mark.fault("N3")
def test_one_token_of_bfloat16() -> None:
    x = inputs(1, 9).bfloat16()
    total = HessianSum(9)
    total.add(x)
    assert close(total.finish().matrix, explicit(x, x))


def test_equal_streams_have_equal_matrix_and_cross() -> None:
    total = HessianSum(12, cross=True)
    total.add(inputs(40, 12))
    found = total.finish()
    assert found.cross is not None
    assert close(found.cross, found.matrix)


@pytest.mark.fault("N6")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])  # 1e30: its square is no float32
def test_a_bad_token_leaves_both_streams_and_is_recorded(bad: float) -> None:
    x, y = inputs(40, 6), inputs(40, 6, seed=1)
    dirty_x, dirty_y = x.clone(), y.clone()
    dirty_x[3, 2] = bad
    dirty_y[17, 0] = bad
    total = HessianSum(6, cross=True)
    total.add_pair(dirty_x, dirty_y)
    found = total.finish()
    good = torch.ones(40, dtype=torch.bool)
    good[[3, 17]] = False
    assert (found.tokens, found.dropped) == (38, 2)
    assert close(found.matrix, explicit(y[good], y[good]))
    assert found.cross is not None
    assert close(found.cross, explicit(x[good], y[good]))
    assert [(r.kind, r.count) for r in found.rescues] == [("nonfinite_tokens", 2)]


@pytest.mark.fault("N1")
@pytest.mark.fault("N6")
def test_too_many_bad_tokens_and_none_at_all_are_errors() -> None:
    x = inputs(20, 4)
    x[:3] = float("nan")
    total = HessianSum(4)
    total.add(x)
    with pytest.raises(NumericalError, match="3 of 20"):
        total.finish()
    with pytest.raises(CalibrationError, match="no calibration tokens"):
        HessianSum(4).finish()


def test_wrong_shapes_are_refused() -> None:
    total = HessianSum(4, cross=True)
    with pytest.raises(ShapeError, match=r"5 columns.*4"):
        total.add(inputs(3, 5))

"""Sums of outer products: bfloat16 units, where the processor has them, against float64 and against the torch twin."""

import pytest
import torch
from math_problems import generator
from torch import Tensor

from leangrid import kernels
from leangrid.errors import ShapeError
from leangrid.kernels import native
from leangrid.kernels.plain import sums as plain_sums

SHAPES = [(1, 1), (5, 3), (31, 16), (33, 17), (64, 32), (100, 40), (1025, 33), (2100, 70), (0, 4)]
needs_units = pytest.mark.skipif(not native.multiplies_bfloat16(), reason="this processor does not multiply bfloat16")


def stream(tokens: int, cols: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(tokens, cols, generator=generator(seed)).to(dtype)


def close(found: Tensor, exact: Tensor, tokens: int) -> bool:
    return bool((found.double() - exact).abs().max() <= 1e-6 * max(float(exact.abs().max()), tokens**0.5, 1.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("tokens", "cols"), SHAPES)
def test_sums_are_added_to_what_was_there(tokens: int, cols: int, dtype: torch.dtype) -> None:
    x, y = stream(tokens, cols, 1, dtype), stream(tokens, cols, 2, dtype)
    matrix, cross = stream(cols, cols, 3, torch.float32), stream(cols, cols, 4, torch.float32)
    wanted = matrix.double() + x.double().T @ x.double(), cross.double() + y.double().T @ x.double()
    alone = matrix.clone()
    kernels.outer_sums(x, alone)
    kernels.outer_sums(x, matrix, y, cross)
    assert torch.equal(matrix.triu(), alone.triu())
    assert close(matrix.triu(), wanted[0].triu(), tokens)
    assert close(cross, wanted[1], tokens)


@pytest.mark.fault("N14")
@needs_units
@pytest.mark.parametrize(("tokens", "cols"), SHAPES)
def test_bfloat16_units_agree_with_torch_and_any_number_of_threads_gives_the_same_bits(tokens: int, cols: int) -> None:
    x, y = stream(tokens, cols, 1), stream(tokens, cols, 2)
    sums = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        sums.append((torch.zeros(cols, cols), torch.zeros(cols, cols)))
        native.outer_sums(x, sums[-1][0], y, sums[-1][1])
    torch.set_num_threads(before)
    twin = torch.zeros(cols, cols), torch.zeros(cols, cols)
    plain_sums.outer_sums(x, twin[0], y, twin[1])
    for matrix, cross in sums:
        assert torch.equal(matrix, sums[0][0])
        assert torch.equal(cross, sums[0][1])
        assert close(matrix.triu(), twin[0].triu().double(), tokens)
        assert close(cross, twin[1].double(), tokens)


@needs_units
def test_other_users_of_the_tiles_are_not_disturbed() -> None:
    a, b = stream(256, 192, 5), stream(192, 320, 6)
    before = a @ b
    native.outer_sums(stream(100, 48, 7), torch.zeros(48, 48), None, None)
    assert torch.equal(a @ b, before)


def test_a_stream_that_is_not_contiguous() -> None:
    x = stream(20, 60, 8)[:, ::3]
    matrix = torch.zeros(20, 20)
    kernels.outer_sums(x, matrix)
    assert close(matrix.triu(), (x.double().T @ x.double()).triu(), 20)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("count", [0, 1, 31, 127, 128, 129, 700])
def test_whether_squares_are_finite(count: int, dtype: torch.dtype) -> None:
    x = stream(1, count, 9, dtype)
    assert kernels.squares_are_finite(x)
    for place in {0, count // 2, count - 1} if count else set[int]():
        for bad in (float("nan"), float("inf"), -float("inf"), 1e25, -3e38):
            spoiled = x.clone()
            spoiled[0, place] = bad
            assert not kernels.squares_are_finite(spoiled)


@pytest.mark.parametrize(
    ("x", "matrix", "original", "cross"),
    [
        (torch.zeros(4, 3), torch.zeros(4, 4), None, None),
        (torch.zeros(4, 3), torch.zeros(3, 3, dtype=torch.float64), None, None),
        (torch.zeros(4, 3), torch.zeros(3, 3), torch.zeros(4, 3), None),
        (torch.zeros(4, 3), torch.zeros(3, 3), torch.zeros(5, 3), torch.zeros(3, 3)),
        (torch.zeros(4, 3), torch.zeros(3, 3), torch.zeros(4, 3).bfloat16(), torch.zeros(3, 3)),
        (torch.zeros(3), torch.zeros(3, 3), None, None),
        (torch.zeros(4, 3), torch.zeros(3, 6)[:, ::2], None, None),
    ],
)
def test_what_does_not_fit_is_refused(x: Tensor, matrix: Tensor, original: Tensor | None, cross: Tensor | None) -> None:
    with pytest.raises(ShapeError):
        kernels.outer_sums(x, matrix, original, cross)

"""Correct the input's own error: a target W~ whose output on the quantized prefix's inputs is the original's output.

min ||W X - W^ X~||^2 over W^ has the same minimiser as the plain problem around W~ = W G H^-1, with H = 2/N X~^T X~ and
G = 2/N X^T X~ (rows of X are tokens). Damped, and taken only a share ``a`` of the way:
    M = (G - H)(H + lambda I)^-1,    W~ = W + a W M.
a = 1 and lambda = 0 is the least-squares target; it overfits when tokens are few, and a = 0.5 is the measured default.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from leangrid.errors import NumericalError

_TOLERANCE = 1e-3  # relative residual of the solve above which float32 is not enough
_PROBES = 8


def correction_matrix(
    matrix: Float[Tensor, "cols cols"], cross: Float[Tensor, "cols cols"], damping: float = 0.01
) -> Float[Tensor, "cols cols"]:
    """M = (G - H)(H + lambda I)^-1, float32, with lambda = ``damping`` * mean(diag H).

    Solved by Cholesky in float32; where that fails or leaves a residual above 1e-3, in float64 (same answer, more time).

    Raises:
        NumericalError: H + lambda I is not positive definite or not finite.
    """
    mean = float(matrix.diagonal().double().mean())
    if mean == 0:  # no input at all reaches the layer: nothing to correct with
        return torch.zeros_like(matrix)
    for dtype in (torch.float32, torch.float64):
        damped = matrix.to(dtype, copy=True)
        damped.diagonal().add_(damping * mean)
        difference = (cross.to(dtype) - matrix.to(dtype)).T
        lower, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0:
            solution = torch.cholesky_solve(difference, lower)
            if _residual(damped, solution, difference) < _TOLERANCE:
                return solution.T.float().contiguous()
    raise NumericalError(
        "the Hessian of the quantized inputs cannot be solved for the correction", "correction", "Use a larger --damping, or --correct 0"
    )


def correct(weight: Float[Tensor, "rows cols"], correction: Float[Tensor, "cols cols"], strength: float) -> Float[Tensor, "rows cols"]:
    """W~ = W + a W M, float32, a = ``strength``; 0 returns the weights unchanged."""
    weight = weight.float()
    return weight if strength == 0 else torch.addmm(weight, weight, correction.to(weight.device), alpha=strength)


def _residual(damped: Tensor, solution: Tensor, difference: Tensor) -> float:
    """Relative residual of damped @ solution = difference on a few fixed random directions: n^2 work, not n^3."""
    generator = torch.Generator().manual_seed(0)
    probes = torch.randn(damped.shape[0], _PROBES, generator=generator).to(damped.device, damped.dtype)
    wanted = difference @ probes
    norm = float(wanted.norm())
    error = float((damped @ (solution @ probes) - wanted).norm())
    return error if norm == 0 else error / norm

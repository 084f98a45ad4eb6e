"""Least squares on the Hessian, given the codes: the normal equations of a grid's parameters, row by row.

The weights W^ are linear in the parameters x of a row, so twice its loss (W^ - W) H (W^ - W)^T is a quadratic in x.
With the gradient b and the matrix A of the normal equations at the present x, a change d of x changes it by
d A d^T + 2 b d^T, and the best change is d = -b A^-1."""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

CHUNK_BYTES = 1 << 27  # of the normal equations that are formed at once
COPIES = 3  # of them while they are solved: A, A with its ridge, and its Cholesky factor


def normal_equations(
    design: Float[Tensor, "rows kinds cols"],
    gradient: Float[Tensor, "rows cols"],
    hessian: Float[Tensor, "cols cols"],
    spans: int,
) -> tuple[Float64[Tensor, "rows unknowns unknowns"], Float64[Tensor, "rows unknowns"]]:
    """A and b of each row, float64; the unknowns are ``kinds`` parameters for each of ``spans`` equal spans of columns.

    With u the design of a parameter, zero outside its span: A_gh = u_g H u_h^T and b_g = u_g (E H)^T.

    Args:
        gradient: E H.
    """
    rows, kinds, cols = design.shape
    size, unknowns = cols // spans, spans * kinds
    normal = torch.empty(rows, unknowns, unknowns, dtype=torch.float64, device=hessian.device)
    for g in range(spans):  # A is symmetric: each product begins at its own span
        mine, later = slice(g * size, (g + 1) * size), slice(g * size, None)
        product = (design[:, :, mine] @ hessian[mine, later])[:, :, None] * design[:, None, :, later]
        sums = product.reshape(rows, kinds, kinds, spans - g, size).sum(4).transpose(2, 3).flatten(2).double()
        normal[:, g * kinds : (g + 1) * kinds, g * kinds :] = sums
        normal[:, g * kinds :, g * kinds : (g + 1) * kinds] = sums.transpose(1, 2)
    slope = (design * gradient[:, None]).reshape(rows, kinds, spans, size).sum(3).transpose(1, 2).flatten(1).double()
    return normal, slope


def solve_ridged(
    normal: Float[Tensor, "rows k k"], slope: Float[Tensor, "rows k"], ridge: float
) -> Float[Tensor, "rows k"]:
    """(A + ridge mean(diag A) I)^-1 b of each row, float64; 0 where A is not positive definite."""
    mean = normal.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)
    ridged = normal.clone()
    ridged.diagonal(dim1=1, dim2=2).add_(torch.where(mean > 0, ridge * mean, torch.ones_like(mean)))
    lower, info = torch.linalg.cholesky_ex(ridged)
    step = torch.cholesky_solve(slope[..., None], lower).squeeze(2)
    return torch.where((info == 0)[:, None] & step.isfinite(), step, torch.zeros_like(step))


def objective_change(
    step: Float[Tensor, "rows k"], normal: Float[Tensor, "rows k k"], slope: Float[Tensor, "rows k"]
) -> Float[Tensor, " rows"]:
    """d A d^T + 2 b d^T of each row: by how much ``step`` = d changes twice its loss."""
    return ((normal @ step[..., None]).squeeze(2) * step).sum(1) + 2 * (slope * step).sum(1)

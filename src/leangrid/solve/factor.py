"""The damped inverse Cholesky factor of a Hessian, and what is done when it does not exist.

U is upper triangular with (H + lambda I)^-1 = U^T U, rows and columns in elimination order. It comes from one Cholesky
of the reversed matrix: J (H + lambda I) J = L L^T gives U = J L^-1 J, so no inverse is ever formed. Everything is
computed on H over a power of four near its mean diagonal, so the scale of H changes nothing. Columns without input keep
their damping alone: they are uncorrelated with the rest, go last, weigh least, and are simply rounded.

Ladder of rescues, each recorded: float32 with the damping asked, 10 times, 100 times, float64 with the damping asked,
the diagonal of H; each rung is accepted only if U^T U (H + lambda I) is the identity on random probes.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from leangrid.errors import NumericalError, ShapeError
from leangrid.solve.rescue import Rescue

TOLERANCE = 1e-2  # relative error of U^T U (H + lambda I) - I on probes
_PROBES = 8
_LEAF = 64  # columns that one thread factors whole
_RUNGS = ((torch.float32, 1.0), (torch.float32, 10.0), (torch.float32, 100.0), (torch.float64, 1.0))


@dataclass(frozen=True, eq=False)
class Factor:
    """U with H_damped^-1 = U^T U, and what the solver needs around it.

    Args:
        upper: U, float32, rows and columns in elimination order.
        order: int64; ``order[i]`` is the column eliminated at step i.
        damped: H + lambda I, float32, columns in ORIGINAL order.
        damping: lambda / mean(diag H) that was used.
        ridge: lambda.
        dead: columns that no calibration token touched, original order.
        rescues: what deviated from the request.
    """

    upper: Float[Tensor, "cols cols"]
    order: Int[Tensor, " cols"]
    damped: Float[Tensor, "cols cols"]
    damping: float
    ridge: float
    dead: Bool[Tensor, " cols"]
    rescues: tuple[Rescue, ...] = ()

    @property
    def is_diagonal(self) -> bool:
        """Whether the last rung was needed: H itself is not what was factored."""
        return any(rescue.kind == "diagonal" for rescue in self.rescues)

    @property
    def diagonal(self) -> Float[Tensor, " cols"]:
        """U_jj, float64, in original column order."""
        return torch.zeros_like(self.upper[0], dtype=torch.float64).scatter_(
            0, self.order, self.upper.diagonal().double()
        )

    def loss_error_weights(self, p: float) -> Float[Tensor, " cols"]:
        """g_j = U_jj^-p, float64, original order, scaled so that the largest is 1.

        The paper writes (H^-1_jj)^-p; its code, which we follow, raises the Cholesky diagonal: p = 4 is the paper's
        setting, p = 2 weighs by the loss error eps_j itself, p = 0 is plain k-means.
        """
        return relative_power(self.diagonal, p)

    def inverse(self) -> Float[Tensor, "cols cols"]:
        """(H + lambda I)^-1 = U^T U, float64, original column order."""
        upper = self.upper[:, torch.argsort(self.order)].double()
        return upper.T @ upper


def relative_power(diagonal: Float[Tensor, " cols"], p: float) -> Float[Tensor, " cols"]:
    """``diagonal``^-p divided by its largest value, so that no p overflows."""
    return (diagonal / diagonal.min()).pow(-p)


def factorize(matrix: Float[Tensor, "cols cols"], damping: float = 0.01, act_order: bool = True) -> Factor:
    """Factor H + lambda I, lambda = ``damping`` * mean(diag H), climbing the ladder of rescues where it must.

    Args:
        matrix: H, symmetric, any float dtype.
        act_order: eliminate by descending diag H (stable), else in column order.

    Raises:
        ShapeError: the matrix is not square.
        NumericalError: the matrix holds NaN or infinite values.
    """
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ShapeError(f"a Hessian is square, not {tuple(matrix.shape)}", "factorize")
    if not bool(matrix.sum().isfinite()) and not bool(
        matrix.isfinite().all()
    ):  # a sum is one cheap pass, and rarely overflows
        raise NumericalError(
            "the Hessian holds NaN or infinite values", "factorize", "Run the model in float32 or bfloat16"
        )
    rescues: list[Rescue] = []
    scaled, scale, mean, dead = _prepare(matrix)
    if bool(dead.any()):
        rescues.append(
            Rescue("dead_columns", f"{int(dead.sum())} of {len(dead)} input columns saw no activation", int(dead.sum()))
        )
    diagonal = scaled.diagonal()
    order = (
        torch.argsort(diagonal, descending=True, stable=True)
        if act_order
        else torch.arange(len(dead), device=matrix.device)
    )
    backwards = order.flip(0)
    reversed_matrix = scaled.index_select(0, backwards).index_select(1, backwards)
    for dtype, factor in _RUNGS:
        upper, error = _inverse_cholesky(reversed_matrix, damping * factor * mean, dtype)
        if upper is not None and error < TOLERANCE:
            if factor != 1:
                rescues.append(Rescue("damping", f"damping {damping * factor:g} instead of {damping:g}"))
            elif dtype == torch.float64:
                rescues.append(Rescue("float64", f"no float32 factor at damping {damping:g}"))
            used = damping * factor
            break
    else:
        used, scaled = damping, torch.diag(diagonal.clamp(min=0))
        upper = torch.diag((diagonal[order].clamp(min=0).double() + used * mean).rsqrt())
        detail = f"no factor up to damping {damping * _RUNGS[2][1]:g}, nor in float64: columns are independent, inputs are not corrected"
        rescues.append(Rescue("diagonal", detail))
    damped = scaled.mul_(scale)
    ridge = used * mean * scale
    damped.diagonal().add_(ridge)
    return Factor(upper.mul_(scale**-0.5).float(), order, damped, used, ridge, dead, tuple(rescues))


def _prepare(matrix: Tensor) -> tuple[Tensor, float, float, Tensor]:
    """H / scale in float32, scale, mean(diag H) / scale, and the mask of dead columns (which hold zeros alone)."""
    diagonal = matrix.diagonal().double().clamp(min=0)
    dead = diagonal == 0
    if bool(dead.any()):
        dead &= (matrix == 0).all(1)
    mean = float(diagonal.mean())
    if mean == 0:  # no input at all: every error costs the same, which is rounding
        return torch.eye(len(dead), device=matrix.device), 1.0, 1.0, dead
    scale = 4.0 ** round(math.log(mean, 4))  # exact in H and, as 2^k, in U
    return (matrix / scale).float(), scale, mean / scale, dead


def split_cholesky_(matrix: Float[Tensor, "cols cols"]) -> bool:
    """Overwrite a symmetric matrix by L, L L^T the matrix; False where it is not positive definite.

    On a CPU by halves down to ``_LEAF`` columns: a half more arithmetic than LAPACK's, in products and triangular
    solves alone, which give the same bits with any number of threads. LAPACK's own blocks depend on it."""
    size = len(matrix)
    if size <= _LEAF or matrix.is_cuda:
        lower, info = torch.linalg.cholesky_ex(matrix)
        matrix.copy_(lower)
        return int(info) == 0
    half = -(-size // (2 * _LEAF)) * _LEAF
    first, below, last = matrix[:half, :half], matrix[half:, :half], matrix[half:, half:]
    if not split_cholesky_(first):
        return False
    below.copy_(torch.linalg.solve_triangular(first.T, below, upper=True, left=False))
    last.addmm_(below, below.T, alpha=-1)
    matrix[:half, half:] = 0
    return split_cholesky_(last)


def _inverse_cholesky(backwards: Tensor, damping: float, dtype: torch.dtype) -> tuple[Tensor | None, float]:
    """U of J backwards J + damping I and its error on probes; (None, inf) where no Cholesky factor exists."""
    damped = backwards.to(dtype, copy=True)
    damped.diagonal().add_(damping)
    size = len(damped)
    whole = (
        size if damped.is_cuda else -(-size // _LEAF) * _LEAF
    )  # at ragged edges products depend on the number of threads
    lower = torch.eye(whole, dtype=dtype, device=damped.device)
    lower[:size, :size] = damped
    if not split_cholesky_(lower):
        return None, float("inf")
    identity = torch.eye(whole, dtype=dtype, device=damped.device)
    upper = torch.linalg.solve_triangular(lower, identity, upper=False)[:size, :size].flip(0, 1)
    generator = torch.Generator().manual_seed(0)
    probes = torch.randn(len(damped), _PROBES, generator=generator).to(damped.device, dtype)
    error = float((upper.T @ (upper @ (damped @ probes).flip(0)) - probes.flip(0)).norm() / probes.norm())
    return upper, error if error == error else float("inf")

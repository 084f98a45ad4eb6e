"""The damped inverse Cholesky factor of a Hessian, and what is done when it does not exist.

U is upper triangular with (H + lambda I)^-1 = U^T U, rows and columns in elimination order. No inverse is formed: with
J the reversal of rows and columns, J (H + lambda I) J = L L^T gives U = J L^-1 J. Everything is computed on H divided
by a power of four near its mean diagonal, so multiplying H by such a power changes no bit of the codes. Columns without
input have only lambda on their diagonal: they are uncorrelated with all others, go last, and are simply rounded.

Where no factor exists, other requests are tried in this order, and each deviation is recorded as a Rescue: float32 with
10 times the damping, with 100 times, float64 with the damping asked for, and the diagonal of H alone. A factor is
accepted only if U^T U (H + lambda I) is the identity on a few random vectors."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from leangrid.errors import NumericalError, ShapeError
from leangrid.machine.arithmetic import use_products
from leangrid.solve.hessian import Hessian
from leangrid.solve.rescue import Rescue

TOLERANCE = 1e-2  # relative error of U^T U (H + lambda I) - I on the random vectors
_PROBES = 8  # how many of them
_LEAF = 64  # columns that one thread factors whole
_WHOLE = 256  # columns up to which a product takes both triangles, and an inverse is a solve against the identity
_ATTEMPTS = ((torch.float32, 1.0), (torch.float32, 10.0), (torch.float32, 100.0), (torch.float64, 1.0))


@dataclass(frozen=True, eq=False)
class Factor:
    """U with (H + lambda I)^-1 = U^T U, and what the solver needs beside it.

    Attributes:
        upper: U, float32, rows and columns in elimination order.
        order: int64; ``order[i]`` is the column that is eliminated at step i.
        damped: H + lambda I, float32, columns in original order.
        damping: lambda / mean(diag H) that was used.
        ridge: lambda.
        dead: columns that no calibration token touched, original order.
        rescues: what was done differently from what was asked.

    Example:
        >>> from leangrid.solve.factor import factorize
        >>> factor = factorize(torch.tensor([[4.0, 0.0], [0.0, 16.0]]), damping=0.0)
        >>> factor.diagonal, factor.loss_error_weights(p=2.0)
        (tensor([0.5000, 0.2500], dtype=torch.float64), tensor([0.2500, 1.0000], dtype=torch.float64))
    """

    upper: Float[Tensor, "cols cols"]
    order: Int[Tensor, " cols"]
    damped: Float[Tensor, "cols cols"]
    damping: float
    ridge: float
    dead: Bool[Tensor, " cols"]
    rescues: tuple[Rescue, ...] = ()

    def to(self, device: torch.device | str) -> "Factor":
        """The same on ``device``."""
        return replace(
            self,
            upper=self.upper.to(device),
            order=self.order.to(device),
            damped=self.damped.to(device),
            dead=self.dead.to(device),
        )

    @property
    def is_diagonal(self) -> bool:
        """Whether nothing but the diagonal of H could be factored."""
        return any(rescue.kind == "diagonal" for rescue in self.rescues)

    @property
    def diagonal(self) -> Float[Tensor, " cols"]:
        """U_jj, float64, in original column order."""
        return torch.zeros_like(self.upper[0], dtype=torch.float64).scatter_(
            0, self.order, self.upper.diagonal().double()
        )

    def loss_error_weights(self, p: float) -> Float[Tensor, " cols"]:
        """g_j = U_jj^-p, float64, original order, scaled so that the largest is 1.

        The paper writes (H^-1_jj)^-p; its code, which we follow, raises the diagonal of the Cholesky factor. p = 4 is
        the paper's setting, p = 2 weighs each column by its loss error, p = 0 is plain k-means.
        """
        return relative_power(self.diagonal, p)

    def inverse(self) -> Float[Tensor, "cols cols"]:
        """(H + lambda I)^-1 = U^T U, float64, original column order."""
        upper = self.upper[:, torch.argsort(self.order)].double()
        return upper.T @ upper


@dataclass(frozen=True, eq=False)
class FactorSummary:
    """What is told of a Hessian and its factor without their matrices: small enough to be sent to another rank.

    Attributes:
        tokens: N of the Hessian.
        damping: lambda / mean(diag H) that was used.
        diagonal: U_jj, float64, in original column order, on the CPU.
        rescues: of both, the Hessian's first.
    """

    tokens: int
    damping: float
    diagonal: Float[Tensor, " cols"]
    rescues: tuple[Rescue, ...]

    @classmethod
    def of(cls, hessian: Hessian, factor: Factor) -> "FactorSummary":
        """The summary of a Hessian and the factor that was made of it."""
        rescues = (*hessian.rescues, *factor.rescues)
        return cls(int(hessian.tokens), float(factor.damping), factor.diagonal.cpu(), rescues)

    def loss_error_weights(self, p: float) -> Float[Tensor, " cols"]:
        """As ``Factor.loss_error_weights``."""
        return relative_power(self.diagonal, p)


def relative_power(diagonal: Float[Tensor, " cols"], p: float) -> Float[Tensor, " cols"]:
    """``diagonal``^-p divided by its largest value, so that no p overflows."""
    return (diagonal / diagonal.min()).pow(-p)


@use_products("float32")
def factorize(matrix: Float[Tensor, "cols cols"], damping: float = 0.01, act_order: bool = True) -> Factor:
    """Factor H + lambda I, lambda = ``damping`` * mean(diag H), with more damping or precision where that is needed.

    Args:
        matrix: H, symmetric, any float dtype, original column order.
        act_order: eliminate columns by descending diag H (stable); else in their own order.

    Raises:
        ShapeError: the matrix is not square.
        NumericalError: the matrix holds NaN or infinite values.

    Example:
        >>> from leangrid.solve.factor import factorize
        >>> factor = factorize(torch.tensor([[4.0, 0.0], [0.0, 16.0]]), damping=0.0)
        >>> factor.order  # the column with the largest input first
        tensor([1, 0])
        >>> factor.upper
        tensor([[0.2500, 0.0000],
                [0.0000, 0.5000]])
    """
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ShapeError(f"a Hessian is square, not {tuple(matrix.shape)}", "factorize")
    # A sum is one cheap pass, and rarely overflows.
    if not bool(matrix.sum().isfinite()) and not bool(matrix.isfinite().all()):
        raise NumericalError(
            "the Hessian holds NaN or infinite values", "factorize", "Run the model in float32 or bfloat16"
        )
    # H over a power of four near its mean diagonal. Without any input every error costs the same, which is rounding.
    scale, mean, dead = scale_and_dead(matrix)
    rescues = dead_rescues(dead)
    if mean == 0:
        scaled, mean = torch.eye(len(dead), device=matrix.device), 1.0
    else:
        scaled = (matrix / scale).float()
    # The elimination order, and J H J in that order.
    diagonal = scaled.diagonal()
    order = elimination_order(diagonal, act_order)
    backwards = order.flip(0)
    reversed_matrix = scaled.index_select(0, backwards).index_select(1, backwards)
    # U, from the first attempt that gives one.
    for dtype, more in _ATTEMPTS:
        upper, error = _inverse_cholesky(reversed_matrix, damping * more * mean, dtype)
        if upper is not None and error < TOLERANCE:
            if more != 1:
                rescues.append(Rescue("damping", f"damping {damping * more:g} instead of {damping:g}"))
            elif dtype == torch.float64:
                rescues.append(Rescue("float64", f"no float32 factor at damping {damping:g}"))
            used = damping * more
            break
    else:
        used, scaled = damping, torch.diag(diagonal.clamp(min=0))
        upper = torch.diag((diagonal[order].clamp(min=0).double() + used * mean).rsqrt())
        most = damping * _ATTEMPTS[2][1]
        detail = f"no factor up to damping {most:g}, nor in float64: columns are independent, inputs are not corrected"
        rescues.append(Rescue("diagonal", detail))
    # Back to the scale of H.
    damped, ridge = scaled.mul_(scale), used * mean * scale
    damped.diagonal().add_(ridge)
    return Factor(upper.mul_(scale**-0.5).float(), order, damped, used, ridge, dead, tuple(rescues))


def scale_and_dead(matrix: Float[Tensor, "cols cols"]) -> tuple[float, float, Bool[Tensor, " cols"]]:
    """The power of four nearest to the mean diagonal of H, mean(diag H) over it, and which columns hold zeros alone.

    Dividing H by a power of four is exact, and so is multiplying U by its root. Where H has no positive finite mean,
    the power is 1.
    """
    diagonal = matrix.diagonal().double().clamp(min=0)
    mean, dead = float(diagonal.mean()), diagonal == 0
    for columns in dead.nonzero().squeeze(1).split(_LEAF):
        dead[columns] = ~matrix[columns].any(1)
    scale = 4.0 ** round(math.log(mean, 4)) if 0 < mean < math.inf else 1.0
    return scale, mean / scale, dead


def dead_rescues(dead: Bool[Tensor, " cols"]) -> list[Rescue]:
    """The record of columns that no token touched; empty where there are none."""
    count = int(dead.sum())
    detail = f"{count} of {len(dead)} input columns saw no activation"
    return [Rescue("dead_columns", detail, count)] if count else []


def elimination_order(diagonal: Float[Tensor, " cols"], act_order: bool) -> Int[Tensor, " cols"]:
    """int64: columns by descending diag H, equal ones in their own order; without ``act_order`` 0, 1, 2, ..."""
    if act_order:
        return torch.argsort(diagonal, descending=True, stable=True)
    return torch.arange(len(diagonal), device=diagonal.device)


def split_cholesky_(matrix: Float[Tensor, "cols cols"]) -> bool:
    """Overwrite a symmetric matrix by L with L L^T = matrix; False where it is not positive definite. What is above the
    diagonal is not read.

    On a CPU by halves, down to ``_LEAF`` columns: of products and triangular solves, which give the same bits with any
    number of threads; LAPACK's own blocks do not."""
    size = len(matrix)
    if size <= _LEAF or matrix.is_cuda:
        lower, info = torch.linalg.cholesky_ex(matrix)
        matrix.copy_(lower)
        return int(info) == 0
    half = _half(size)
    first, below, last = matrix[:half, :half], matrix[half:, :half], matrix[half:, half:]
    if not split_cholesky_(first):
        return False
    below.copy_(torch.linalg.solve_triangular(first.T, below, upper=True, left=False))
    _subtract_square_(last, below)
    matrix[:half, half:] = 0
    return split_cholesky_(last)


def invert_triangular_(lower: Float[Tensor, "cols cols"]) -> Float[Tensor, "cols cols"]:
    """Overwrite a lower triangular matrix by its inverse, and return it.

    On a CPU by halves, down to ``_WHOLE`` columns: of [[A, 0], [B, C]] it is [[A^-1, 0], [-C^-1 B A^-1, C^-1]]. That is
    little more than n^3 / 3 operations, a third of those of a solve against the identity, in products whose bits are
    the same for any number of threads."""
    size = len(lower)
    if size <= _WHOLE or lower.is_cuda:
        identity = torch.eye(size, dtype=lower.dtype, device=lower.device)
        return lower.copy_(torch.linalg.solve_triangular(lower, identity, upper=False))
    half = _half(size)
    first, below, last = lower[:half, :half], lower[half:, :half], lower[half:, half:]
    invert_triangular_(first)
    invert_triangular_(last)
    _multiply_by_lower_(below, first)
    _multiply_by_lower_(below, last, from_left=True)
    below.neg_()
    return lower


def _multiply_by_lower_(matrix: Tensor, lower: Tensor, from_left: bool = False) -> None:
    """matrix <- matrix lower, or lower matrix: by halves, since half of a lower triangular matrix is zeros."""
    size = len(lower)
    if size <= 2 * _WHOLE:
        matrix.copy_(lower @ matrix if from_left else matrix @ lower)
        return
    half = _half(size)
    first, below, last = lower[:half, :half], lower[half:, :half], lower[half:, half:]
    if from_left:  # [A X; B X + C Y], the second first: it reads X
        _multiply_by_lower_(matrix[half:], last, from_left)
        matrix[half:].addmm_(below, matrix[:half])
        _multiply_by_lower_(matrix[:half], first, from_left)
    else:  # [X A + Y B, Y C], the first first: it reads Y
        _multiply_by_lower_(matrix[:, :half], first)
        matrix[:, :half].addmm_(matrix[:, half:], below)
        _multiply_by_lower_(matrix[:, half:], last)


def _half(size: int) -> int:
    """Columns of the first half: a multiple of ``_LEAF``."""
    return -(-size // (2 * _LEAF)) * _LEAF


def _subtract_square_(matrix: Tensor, rows: Tensor) -> None:
    """matrix -= rows rows^T in place: the lower triangle, and some blocks of the upper one."""
    size = len(matrix)
    if size <= _WHOLE:
        matrix.addmm_(rows, rows.T, alpha=-1)
        return
    half = _half(size)
    _subtract_square_(matrix[:half, :half], rows[:half])
    matrix[half:, :half].addmm_(rows[half:], rows[:half].T, alpha=-1)
    _subtract_square_(matrix[half:, half:], rows[half:])


def _inverse_cholesky(backwards: Tensor, damping: float, dtype: torch.dtype) -> tuple[Tensor | None, float]:
    """U of J backwards J + damping I, and its error on random vectors; (None, inf) where no Cholesky factor exists."""
    damped = backwards.to(dtype, copy=True)
    damped.diagonal().add_(damping)
    size = len(damped)
    # On a CPU padded to a multiple of _LEAF: at ragged edges the bits of a product depend on the number of threads.
    whole = size if damped.is_cuda else -(-size // _LEAF) * _LEAF
    lower = torch.eye(whole, dtype=dtype, device=damped.device)
    lower[:size, :size] = damped
    if not split_cholesky_(lower):
        return None, float("inf")
    upper = invert_triangular_(lower)[:size, :size].flip(0, 1)
    return upper, inversion_error(upper, lambda probes: (damped @ probes.flip(0)).flip(0))


def inversion_error(upper: Float[Tensor, "cols cols"], multiply_damped: Callable[[Tensor], Tensor]) -> float:
    """Relative error of U^T U (H + lambda I) - I on a few fixed random vectors; infinite where it is NaN.

    ``multiply_damped`` returns (H + lambda I) v for vectors v [cols, n]; all are in elimination order."""
    generator = torch.Generator().manual_seed(0)
    probes = torch.randn(len(upper), _PROBES, generator=generator).to(upper.device, upper.dtype).flip(0)
    error = float((upper.T @ (upper @ multiply_damped(probes)) - probes).norm() / probes.norm())
    return error if error == error else math.inf

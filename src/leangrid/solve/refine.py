"""After the sweep: refit the grid by least squares on H given the codes, then let codes move, round by round.

Q is the quantized weight, E = Q - W, and everything works from the gradient E H:
* refit, non-uniform: the levels c of a row minimise (P c - w) H (P c - w)^T, P the one-hot codes: P^T H P d = -P^T H
e^T.
* refit, groups: the parameters of a row's groups, each with its unit u (of a scale S: code - Z; of an offset: ones):
  A d = -b, A_gh = u_g H_gh u_h^T, b_g = u_g (E H)_g^T.
* descent: in blocks of columns each code moves to the level nearest to q - gradient / h_jj; a GEMM a block carries it
on. Every step rounds to the stored dtype before it is judged, and each row keeps whichever state has the lower loss.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from leangrid import kernels
from leangrid.grids import Grid, GroupedGrid, NonuniformGrid, Precision
from leangrid.grids.nonuniform import round_levels

_BLOCK = 128
_CHUNK_BYTES = 1 << 27  # of a batch of normal equations
_RIDGE = {"affine": 1e-6, "nonuniform": 1e-8}  # in units of the mean diagonal, towards the present values


@dataclass(frozen=True, eq=False)
class Refined:
    """Codes and grid in the stored dtype's values, levels ascending; ``loss`` float64 [rows], under the damped H."""

    codes: UInt8[Tensor, "rows cols"]
    grid: Grid
    loss: Float[Tensor, " rows"]


def refine(
    target: Float[Tensor, "rows cols"],
    codes: UInt8[Tensor, "rows cols"],
    grid: Grid,
    matrix: Float[Tensor, "cols cols"],
    rounds: int,
    scale_dtype: torch.dtype | Precision = torch.float32,
) -> Refined:
    """``rounds`` times refit and descend, then a last refit; the loss of no row rises.

    Args:
        target: the weights that the codes approximate, float32.
        matrix: the damped H, original column order.
        rounds: at least 1.
        scale_dtype: what scales or levels are stored in.
    """
    state, stored = _State.of(target, codes, grid, matrix), Precision.of(scale_dtype)
    for _ in range(rounds):
        refitted = _refit(state, matrix, stored)
        state = _descend(_State.of(target, refitted.codes, refitted.grid, matrix), matrix)
    return _refit(state, matrix, stored)


@dataclass(frozen=True, eq=False)
class _State:
    """Codes on a grid, with E = Q - W, the gradient E H, and twice the loss of each row."""

    codes: Tensor
    grid: Grid
    error: Tensor
    gradient: Tensor
    loss: Tensor

    @classmethod
    def of(cls, target: Tensor, codes: Tensor, grid: Grid, matrix: Tensor) -> "_State":
        error = grid.dequantize(codes).sub_(target)
        gradient = error @ matrix
        return cls(codes, grid, error, gradient, (error * gradient).sum(1))

    def better(self, other: "_State") -> "_State":
        """``other``, but this state's rows wherever their loss did not fall."""
        worse = ~(other.loss < self.loss)
        if not bool(worse.any()):
            return other
        mine, rows = worse[:, None], worse.nonzero().squeeze(1)
        return _State(
            torch.where(mine, self.codes, other.codes),
            other.grid if other.grid is self.grid else other.grid.put(rows, self.grid.take(rows)),
            torch.where(mine, self.error, other.error),
            torch.where(mine, self.gradient, other.gradient),
            torch.where(worse, self.loss, other.loss),
        )


def _refit(state: _State, matrix: Tensor, stored: Precision) -> Refined:
    """The least-squares grid given the codes, rounded as it is stored; levels may change places with their codes.

    A step d changes twice the loss by d A d^T + 2 b d^T, with A and b of the normal equations: that decides for each
    row whether the rounded step is taken, and no product with H is needed to judge it."""
    if isinstance(state.grid, GroupedGrid):
        codes, grid, change = _refit_units(state, state.grid, matrix, stored)
    else:
        codes, grid, change = _refit_levels(state, matrix, stored.dtype)
    worse = (~(change < 0)).nonzero().squeeze(1)
    if len(worse):
        grid = grid.put(worse, state.grid.take(worse))
        codes = codes.index_copy(0, worse, state.codes[worse])
    return Refined(codes, grid, (state.loss.double() + change.clamp(max=0)) / 2)


def _refit_levels(state: _State, matrix: Tensor, dtype: torch.dtype) -> tuple[Tensor, Grid, Tensor]:
    """Least-squares levels given the codes, sorted again; a level without codes stays where it is."""
    old = state.grid.levels.double()
    normal = kernels.level_gram(matrix, state.codes, old.shape[1])
    index = state.codes.long()
    slope = torch.zeros_like(state.grid.levels).scatter_add_(1, index, state.gradient).double()
    levels = round_levels((old - _solve(normal, slope, _RIDGE["nonuniform"])).float(), dtype)
    change = _change(levels.double() - old, normal, slope)
    levels, order = levels.sort(dim=1, stable=True)
    rank = torch.argsort(order, dim=1)  # rank[old code] = new code
    return rank.gather(1, index).to(torch.uint8), NonuniformGrid(levels), change


def _refit_units(state: _State, grid: GroupedGrid, matrix: Tensor, stored: Precision) -> tuple[Tensor, Grid, Tensor]:
    """Least-squares parameters of all spans of a row together, rounded as they are stored."""
    rows, spans, kinds = grid.free.shape
    count, cols = spans * kinds, state.codes.shape[1]
    size, parts, change = cols // spans, [], torch.zeros(rows, dtype=torch.float64, device=matrix.device)
    chunk = max(1, _CHUNK_BYTES // max(8 * count * count, 4 * cols * kinds * kinds))
    for start in range(0, rows, chunk):
        index = torch.arange(start, min(start + chunk, rows), device=matrix.device)
        here = grid.take(index)
        unit = here.units(state.codes[index])
        normal = torch.empty(len(index), count, count, dtype=torch.float64, device=matrix.device)
        for g in range(spans):  # the upper triangle is enough: each product starts at its own span
            mine, later = slice(g * size, (g + 1) * size), slice(g * size, None)
            product = (unit[:, :, mine] @ matrix[mine, later])[:, :, None] * unit[:, None, :, later]
            sums = product.reshape(len(index), kinds, kinds, spans - g, size).sum(4).transpose(2, 3).flatten(2).double()
            normal[:, g * kinds : (g + 1) * kinds, g * kinds :] = sums
            normal[:, g * kinds :, g * kinds : (g + 1) * kinds] = sums.transpose(1, 2)
        slope = (
            (unit * state.gradient[index, None])
            .reshape(len(index), kinds, spans, size)
            .sum(3)
            .transpose(1, 2)
            .flatten(1)
            .double()
        )
        old = here.free.flatten(1).double()
        new = here.refitted(
            (old - _solve(normal, slope, _RIDGE["affine"])).float().reshape(here.free.shape), stored.dtype
        ).clamped(stored)
        change[index] = _change(new.free.flatten(1).double() - old, normal, slope)
        parts.append(new)
    return state.codes, parts[0].stacked(parts[1:]), change


def _change(
    step: Float[Tensor, "rows k"], normal: Float[Tensor, "rows k k"], slope: Float[Tensor, "rows k"]
) -> Float[Tensor, " rows"]:
    """d A d^T + 2 b d^T of each row."""
    return ((normal @ step[..., None]).squeeze(2) * step).sum(1) + 2 * (slope * step).sum(1)


def _solve(normal: Float[Tensor, "rows k k"], slope: Float[Tensor, "rows k"], ridge: float) -> Float[Tensor, "rows k"]:
    """(A + ridge mean(diag A) I)^-1 slope in float64, row by row; 0 (no step) where A is not positive definite."""
    mean = normal.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)
    ridged = normal.clone()
    ridged.diagonal(dim1=1, dim2=2).add_(torch.where(mean > 0, ridge * mean, torch.ones_like(mean)))
    lower, info = torch.linalg.cholesky_ex(ridged)
    step = torch.cholesky_solve(slope[..., None], lower).squeeze(2)
    return torch.where((info == 0)[:, None] & step.isfinite(), step, torch.zeros_like(step))


def _descend(state: _State, matrix: Tensor) -> _State:
    """One cyclic pass over the codes."""
    grid, cols = state.grid, state.codes.shape[1]
    codes, error, gradient = state.codes.clone(), state.error.clone(), state.gradient.clone()
    group = grid.group_of(cols)
    for start in range(0, cols, _BLOCK):
        part = slice(start, min(start + _BLOCK, cols))
        slope, corner, old = (
            gradient[:, part].contiguous(),
            matrix[part, part].contiguous(),
            state.codes[:, part].contiguous(),
        )
        codes[:, part], delta = grid.descend_block(slope, corner, old, group[part])
        error[:, part] += delta
        gradient.addmm_(delta, matrix[part])
    return state.better(_State(codes, grid, error, gradient, (error * gradient).sum(1)))

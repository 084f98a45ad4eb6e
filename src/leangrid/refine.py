"""After the sweep: refit the grid by least squares on H given the codes, then let codes move, round by round.

Q is the quantized weight, E = Q - W, and everything works from the gradient E H:
* refit, non-uniform: the levels c of a row minimise (P c - w) H (P c - w)^T, P the one-hot codes: P^T H P d = -P^T H e^T.
* refit, affine: the scales s of a row's groups, with u = code - Z: A d = -b, A_gh = u_g H_gh u_h^T, b_g = u_g (E H)_g^T.
* descent: in blocks of columns each code moves to the level nearest to q - gradient / h_jj; a GEMM a block carries it on.
Every step rounds to the stored dtype before it is judged, and each row keeps whichever state has the lower loss.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from leangrid import kernels
from leangrid.grids import AffineGrid, Grid, NonuniformGrid
from leangrid.grids.affine import round_scale

_BLOCK = 128
_CHUNK_BYTES = 1 << 27  # of a batch of normal equations
_RIDGE = {"affine": 1e-6, "nonuniform": 1e-8}  # in units of the mean diagonal, towards the present values


def refine(
    target: Float[Tensor, "rows cols"],
    codes: UInt8[Tensor, "rows cols"],
    grid: Grid,
    matrix: Float[Tensor, "cols cols"],
    rounds: int,
    scale_dtype: torch.dtype = torch.float32,
) -> tuple[UInt8[Tensor, "rows cols"], Grid]:
    """``rounds`` times refit and descend, then a last refit; the loss of no row rises. 0 rounds changes nothing.

    Args:
        target: the weights that the codes approximate, float32.
        matrix: the damped H, original column order.
        scale_dtype: dtype that scales or levels are stored in.

    Returns:
        codes and grid, in the stored dtype's values; levels stay ascending.
    """
    if rounds == 0:
        return codes, grid
    state = _State.of(target, codes, grid, matrix)
    for _ in range(rounds):
        state = _refit(target, state, matrix, scale_dtype)
        state = _descend(state, matrix)
    state = _refit(target, state, matrix, scale_dtype)
    return state.codes, state.grid


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


def _refit(target: Tensor, state: _State, matrix: Tensor, dtype: torch.dtype) -> _State:
    """The least-squares grid given the codes, rounded as it is stored; levels may change places with their codes."""
    grid = state.grid
    if isinstance(grid, AffineGrid):
        codes, new = _refit_scales(state.codes, grid, matrix, state.gradient, dtype)
    else:
        codes, new = _refit_levels(state.codes, grid, matrix, state.gradient, dtype)
    return state.better(_State.of(target, codes, new, matrix))


def _refit_levels(codes: Tensor, grid: Grid, matrix: Tensor, gradient: Tensor, dtype: torch.dtype) -> tuple[Tensor, Grid]:
    """Least-squares levels given the codes, sorted again; a level without codes stays where it is."""
    count = grid.levels.shape[1]
    normal = kernels.level_gram(matrix, codes, count)
    index = codes.long()
    slope = torch.zeros_like(grid.levels).scatter_add_(1, index, gradient).double()
    levels = grid.levels.double() - _solve(normal, slope, _RIDGE["nonuniform"])
    levels, order = levels.sort(dim=1, stable=True)
    rank = torch.argsort(order, dim=1)  # rank[old code] = new code
    return rank.gather(1, index).to(torch.uint8), NonuniformGrid(levels.float()).rounded(dtype)


def _refit_scales(codes: Tensor, grid: AffineGrid, matrix: Tensor, gradient: Tensor, dtype: torch.dtype) -> tuple[Tensor, Grid]:
    """Least-squares scales of all groups of a row together; a scale that would vanish or change its sign stays."""
    rows, groups = grid.scale.shape
    size = codes.shape[1] // groups
    scale = grid.scale.clone()
    chunk = max(1, _CHUNK_BYTES // (8 * groups * groups))
    for start in range(0, rows, chunk):
        part = slice(start, start + chunk)
        unit = codes[part].float().reshape(-1, groups, size) - grid.zero_point[part, :, None]
        flat = unit.flatten(1)
        normal = torch.empty(len(unit), groups, groups, dtype=torch.float64, device=codes.device)
        for g in range(groups):  # the upper triangle is enough: each product starts at its own group
            product = (unit[:, g] @ matrix[g * size : (g + 1) * size, g * size :]).mul_(flat[:, g * size :])
            normal[:, g, g:] = product.reshape(len(unit), -1, size).sum(2)
            normal[:, g:, g] = normal[:, g, g:]
        slope = (unit * gradient[part].reshape(unit.shape)).sum(2).double()
        solved = (scale[part].double() - _solve(normal, slope, _RIDGE["affine"])).float()
        scale[part] = torch.where(solved.isfinite() & (solved * scale[part].sign() > 0), solved, scale[part])
    return codes, replace(grid, scale=round_scale(scale, dtype))


def _solve(normal: Float[Tensor, "rows k k"], slope: Float[Tensor, "rows k"], ridge: float) -> Float[Tensor, "rows k"]:
    """(A + ridge mean(diag A) I)^-1 slope in float64, row by row; 0 (no step) where A is not positive definite."""
    mean = normal.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)
    normal.diagonal(dim1=1, dim2=2).add_(torch.where(mean > 0, ridge * mean, torch.ones_like(mean)))
    lower, info = torch.linalg.cholesky_ex(normal)
    step = torch.cholesky_solve(slope[..., None], lower).squeeze(2)
    return torch.where((info == 0)[:, None] & step.isfinite(), step, torch.zeros_like(step))


def _descend(state: _State, matrix: Tensor) -> _State:
    """One cyclic pass over the codes."""
    grid, cols = state.grid, state.codes.shape[1]
    codes, error, gradient = state.codes.clone(), state.error.clone(), state.gradient.clone()
    group = grid.group_of(cols) if isinstance(grid, AffineGrid) else None
    for start in range(0, cols, _BLOCK):
        part = slice(start, min(start + _BLOCK, cols))
        slope, corner, old = gradient[:, part].contiguous(), matrix[part, part].contiguous(), state.codes[:, part].contiguous()
        if isinstance(grid, AffineGrid) and group is not None:
            codes[:, part], delta = kernels.descend_affine(slope, corner, old, grid.scale, grid.zero_point, group[part], grid.bits)
        else:
            codes[:, part], delta = kernels.descend_levels(slope, corner, old, grid.levels)
        error[:, part] += delta
        gradient.addmm_(delta, matrix[part])
    return state.better(_State(codes, grid, error, gradient, (error * gradient).sum(1)))

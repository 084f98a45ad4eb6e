"""After the sweep: refit the grid by least squares on H given the codes, then let codes move, round by round.

Q is the quantized weight, E = Q - W, and everything works from the gradient E H:
* refit, non-uniform: the levels c of a row minimise (P c - w) H (P c - w)^T, P the one-hot codes: P^T H P d = -P^T H e^T.
* refit, affine: the scales s of a row's groups, with u = code - Z: A d = -b, A_gh = u_g H_gh u_h^T, b_g = u_g (E H)_g^T.
* descent: in blocks of columns each code moves to the level nearest to q - gradient / h_jj; a GEMM a block carries it on.
Every step rounds to the stored dtype before it is judged, and each row keeps whichever state has the lower loss.
"""

from dataclasses import replace

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
    gradient = (grid.dequantize(codes) - target) @ matrix
    for _ in range(rounds):
        codes, grid, gradient = _refit(target, codes, grid, matrix, gradient, scale_dtype)
        codes, gradient = _descend(target, codes, grid, matrix, gradient)
    codes, grid, _ = _refit(target, codes, grid, matrix, gradient, scale_dtype)
    return codes, grid


def _row_losses(target: Tensor, codes: Tensor, grid: Grid, gradient: Tensor) -> Tensor:
    return (grid.dequantize(codes) - target).mul_(gradient).sum(1, dtype=torch.float64)


def _refit(target: Tensor, codes: Tensor, grid: Grid, matrix: Tensor, gradient: Tensor, dtype: torch.dtype) -> tuple[Tensor, Grid, Tensor]:
    """New codes (levels may change order), grid and gradient; rows that did not gain are left as they were."""
    before = _row_losses(target, codes, grid, gradient)
    if isinstance(grid, AffineGrid):
        new_codes, new_grid = _refit_scales(codes, grid, matrix, gradient, dtype)
    else:
        new_codes, new_grid = _refit_levels(codes, grid, matrix, gradient, dtype)
    new_gradient = (new_grid.dequantize(new_codes) - target) @ matrix
    worse = ~(_row_losses(target, new_codes, new_grid, new_gradient) < before)
    if bool(worse.any()):
        new_grid = new_grid.put(worse, grid.take(worse))
        new_codes = torch.where(worse[:, None], codes, new_codes)
        new_gradient[worse] = gradient[worse]
    return new_codes, new_grid, new_gradient


def _refit_levels(codes: Tensor, grid: Grid, matrix: Tensor, gradient: Tensor, dtype: torch.dtype) -> tuple[Tensor, Grid]:
    """Least-squares levels given the codes, sorted again; a level without codes stays where it is."""
    count = grid.levels.shape[1]
    normal = kernels.level_gram(matrix, codes, count)
    slope = torch.zeros(len(codes), count, dtype=torch.float64, device=codes.device).scatter_add_(1, codes.long(), gradient.double())
    levels = grid.levels.double() - _solve(normal, slope, _RIDGE["nonuniform"])
    levels, order = levels.sort(dim=1, stable=True)
    rank = torch.argsort(order, dim=1)  # rank[old code] = new code
    return rank.gather(1, codes.long()).to(torch.uint8), NonuniformGrid(levels.float()).rounded(dtype)


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
        slope = (unit * gradient[part].reshape(unit.shape)).sum(2, dtype=torch.float64)
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


def _descend(target: Tensor, codes: Tensor, grid: Grid, matrix: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """One cyclic pass over the codes; rows whose loss did not fall keep their codes."""
    before = _row_losses(target, codes, grid, gradient)
    moved, slope, cols = codes.clone(), gradient.clone(), codes.shape[1]
    for start in range(0, cols, _BLOCK):
        part = slice(start, min(start + _BLOCK, cols))
        corner, here, old = matrix[part, part].contiguous(), slope[:, part].contiguous(), codes[:, part].contiguous()
        if isinstance(grid, AffineGrid):
            group = grid.group_of(cols)[part].contiguous()
            new, delta = kernels.descend_affine(here, corner, old, grid.scale, grid.zero_point, group, grid.bits)
        else:
            new, delta = kernels.descend_levels(here, corner, old, grid.levels)
        moved[:, part] = new
        slope.addmm_(delta, matrix[part])
    worse = ~(_row_losses(target, moved, grid, slope) < before)
    return torch.where(worse[:, None], codes, moved), torch.where(worse[:, None], gradient, slope)

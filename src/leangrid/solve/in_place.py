"""The algebra of one group where its matrices hardly fit: the plain path's results, three matrices of H's size at once.

For 53,248 columns H alone has 10.6 GiB. The plain path (hessian, factor, correction, linear) holds about nine such
matrices for a moment, and about ten copies of a layer's weights. Here, in order:
* H and G are finished in the memory in which they were summed;
* where the group has fewer rows than columns, W (G - H) is formed and waits on the host, and G is let go; else G
  becomes M in its own place;
* one permuted copy of H becomes its Cholesky factor, the factor's inverse, and U, in place and in panels;
* the correction W (G - H)(H + lambda I)^-1 = W (G - H) U^T U needs no factorization of its own;
* rows never interact, so a layer is solved a tile of rows at a time, with H, H + lambda I and U in memory.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from leangrid.errors import ShapeError
from leangrid.grids import Precision
from leangrid.recipe import Recipe
from leangrid.solve.correction import solved
from leangrid.solve.factor import TOLERANCE, Factor, factorize, split_cholesky_
from leangrid.solve.hessian import Hessian, HessianSum, mirror_
from leangrid.solve.layer import LinearResult, solve_linear
from leangrid.solve.rescue import Rescue

PANEL = 2048  # columns of a step: wide enough for a GEMM at full speed, and a small share of the matrix
TILE_BYTES = 1 << 28  # of one float32 copy of the rows that are solved at once
_PROBES = 8


class WideSum(HessianSum):
    """A HessianSum that is finished in its own memory; ``finish`` ends it."""

    def finish(self) -> Hessian:
        """As HessianSum.finish, bit for bit and with its errors."""
        judged = HessianSum(1)  # the rules (tokens lost, overflow) stand in its finish
        judged.tokens, judged.dropped = self.tokens, self.dropped
        judged._matrix += self._matrix.sum().cpu() + (0.0 if self._cross is None else self._cross.sum().cpu())
        judged.finish()
        mirror_(self._matrix).mul_(2.0 / self.tokens)
        if self._cross is not None:
            self._cross.mul_(2.0 / self.tokens)
        cross, self._cross = self._cross, None  # whoever asked owns it now, and may let it go
        return Hessian(self._matrix, cross, self.tokens, self.dropped)


class WideGroup:
    """One group of linears: factored once, then each solved by ``tiles``.

    Args:
        total: the group's tokens; it is finished here.
        weights: every linear of the group, any float dtype and device [rows, cols].
        strength: a, the share of the inputs' own error that is corrected.
        panel: columns a step; any number gives the same results up to rounding.

    Raises:
        CalibrationError, NumericalError: as HessianSum.finish.
    """

    def __init__(
        self, total: WideSum, weights: Mapping[str, Tensor], recipe: Recipe, strength: float, panel: int = PANEL
    ) -> None:
        self.recipe, self.strength, self._panel = recipe, strength, panel
        self._weights = dict(weights)
        self._folded: dict[str, Tensor] = {}
        self._moves: Tensor | None = None
        summed, cols = total.finish(), total.cols
        self.hessian, cross = replace(summed, cross=None), summed.cross
        del summed  # or it would keep G
        if cross is not None:
            cross.sub_(self.hessian.matrix)
            if sum(len(w) for w in weights.values()) < cols:
                self._folded = {name: self._fold(weight, cross) for name, weight in weights.items()}
                cross = None
        self.factor = factorize_in_place(self.hessian.matrix, recipe.damping, recipe.act_order, panel)
        if cross is not None:
            for start in range(0, cols, panel):
                cross[start : start + panel] = solved(self.factor, cross[start : start + panel])
            self._moves = cross

    def tiles(
        self,
        name: str,
        dtype: torch.dtype | Precision = torch.float32,
        tile: int | None = None,
        recipe: Recipe | None = None,
        share: tuple[int, int] = (0, 1),
    ) -> list[LinearResult]:
        """``solve_linear`` of one linear on the device of H, ``tile`` rows at a time; ``stacked`` makes one result of
        them.

        ``recipe``: where it is not the group's. ``share``: part i of n of the rows; the parts in order are the linear.
        What the plain path decides for a whole layer (rounding instead of a result worse than it) is decided for a
        tile."""
        (rows, cols), (part, parts) = self._weights[name].shape, share
        tile = tile or max(1, TILE_BYTES // (4 * cols))
        first, end, results = rows * part // parts, rows * (part + 1) // parts, []
        for start in range(first, end, tile):
            target = self._target(name, start, min(start + tile, end))
            results.append(solve_linear(target, self.factor, self.hessian.matrix, recipe or self.recipe, dtype))
        return results

    def _fold(self, weight: Tensor, difference: Tensor) -> Tensor:
        """W (G - H), float32, on the host."""
        out = torch.empty(weight.shape, dtype=torch.float32)
        for start in range(0, len(weight), self._panel):
            rows = weight[start : start + self._panel].to(difference.device, torch.float32)
            out[start : start + self._panel] = rows @ difference
        return out

    def _target(self, name: str, start: int, stop: int) -> Tensor:
        """W~ = W + a W (G - H)(H + lambda I)^-1, rows ``start`` to ``stop``."""
        weight = self._weights[name][start:stop].to(self.hessian.matrix.device, torch.float32)
        if self.factor.is_diagonal:
            return weight
        if name in self._folded:
            return weight.add(
                solved(self.factor, self._folded[name][start:stop].to(weight.device)), alpha=self.strength
            )
        return weight if self._moves is None else torch.addmm(weight, weight, self._moves, alpha=self.strength)


def factorize_in_place(
    matrix: Float[Tensor, "cols cols"], damping: float = 0.01, act_order: bool = True, panel: int = PANEL
) -> Factor:
    """``factorize`` with one matrix besides its results; where float32 at the damping asked fails, ``factorize`` itself
    on the CPU."""
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ShapeError(f"a Hessian is square, not {tuple(matrix.shape)}", "factorize_in_place")
    diagonal = matrix.diagonal().double().clamp(min=0)
    dead = diagonal == 0
    mean = float(diagonal.mean())
    if not mean > 0 or mean == math.inf:
        return _on_cpu(matrix, damping, act_order)
    for column in dead.nonzero().flatten().tolist():
        dead[column] = not bool(matrix[column].any())
    scale = 4.0 ** round(math.log(mean, 4))  # as in factorize: exact in H and, as 2^k, in U
    order = torch.arange(len(matrix), device=matrix.device)
    if act_order:
        order = torch.argsort((matrix.diagonal() / scale).float(), descending=True, stable=True)
    upper = torch.empty_like(matrix)
    last_first = order.flip(0)
    for start in range(0, len(matrix), panel):
        torch.index_select(matrix[last_first[start : start + panel]], 1, last_first, out=upper[start : start + panel])
    upper.div_(scale).diagonal().add_(damping * mean / scale)
    if not cholesky_(upper, panel):
        del upper
        return _on_cpu(matrix, damping, act_order)
    reverse_(invert_lower_(upper, panel))
    if not _error(matrix, upper, order, scale, damping * mean / scale) < TOLERANCE:
        del upper
        return _on_cpu(matrix, damping, act_order)
    damped = matrix.clone()
    damped.div_(scale).diagonal().add_(damping * mean / scale)
    rescues = (
        Rescue("dead_columns", f"{int(dead.sum())} of {len(dead)} input columns saw no activation", int(dead.sum())),
    )
    return Factor(
        upper.div_(scale**0.5),
        order,
        damped.mul_(scale),
        damping,
        damping * mean,
        dead,
        rescues if bool(dead.any()) else (),
    )


def cholesky_(matrix: Float[Tensor, "cols cols"], panel: int = PANEL) -> bool:
    """Overwrite a symmetric matrix (its lower triangle is read) by L, L L^T the matrix; False where it is not positive
    definite."""
    size = len(matrix)
    for start in range(0, size, panel):
        stop = min(start + panel, size)
        lower = matrix[start:stop, start:stop]
        if not split_cholesky_(lower):
            return False
        matrix[start:stop, stop:] = 0
        below = matrix[stop:, start:stop]
        below.copy_(torch.linalg.solve_triangular(lower.T, below, upper=True, left=False))
        for left in range(stop, size, panel):
            right = min(left + panel, size)
            matrix[left:, left:right].addmm_(below[left - stop :], below[left - stop : right - stop].T, alpha=-1)
    return True


def invert_lower_(lower: Float[Tensor, "cols cols"], panel: int = PANEL) -> Float[Tensor, "cols cols"]:
    """Overwrite a lower triangular matrix by its inverse, last panel first: the inverse below a panel is there when it
    is needed."""
    size = len(lower)
    for start in reversed(range(0, size, panel)):
        stop = min(start + panel, size)
        identity = torch.eye(stop - start, dtype=lower.dtype, device=lower.device)
        corner = torch.linalg.solve_triangular(lower[start:stop, start:stop], identity, upper=False)
        lower[start:stop, start:stop] = corner
        below = lower[stop:, start:stop]
        for top in reversed(range(stop, size, panel)):  # the last rows first: they read all rows above them
            bottom = min(top + panel, size)
            lower[top:bottom, start:stop] = (lower[top:bottom, stop:bottom] @ below[: bottom - stop]) @ corner.neg()
    return lower


def reverse_(matrix: Float[Tensor, "cols cols"], chunk: int = 1 << 26) -> Float[Tensor, "cols cols"]:
    """Rows and columns in reverse order, in place: a contiguous matrix read backwards."""
    flat = matrix.view(-1)
    count = flat.numel()
    for start in range(0, count // 2, chunk):
        stop = min(start + chunk, count // 2)
        head, tail = flat[start:stop], flat[count - stop : count - start]
        kept = head.flip(0)
        head.copy_(tail.flip(0))
        tail.copy_(kept)
    return matrix


def stacked(parts: list[LinearResult]) -> LinearResult:
    """The results of consecutive rows as one: codes and grids stacked, losses and seconds added, rescues of a kind
    counted together."""
    if len(parts) == 1:
        return parts[0]
    rescues: dict[str, Rescue] = {}
    for rescue in (r for part in parts for r in part.rescues):
        before = rescues.get(rescue.kind)
        rescues[rescue.kind] = rescue if before is None else replace(before, count=before.count + rescue.count)
    several = tuple(replace(r, detail=f"{r.detail}; {r.count} in all tiles of rows") for r in rescues.values())
    return LinearResult(
        torch.cat([part.codes for part in parts]),
        parts[0].grid.stacked([part.grid for part in parts[1:]]),
        sum(part.loss for part in parts),
        sum(part.loss_minmax for part in parts),
        sum(part.loss_rounding for part in parts),
        several,
        {stage: sum(part.seconds[stage] for part in parts) for stage in parts[0].seconds},
        {stage: sum(part.flops[stage] for part in parts) for stage in parts[0].flops},
    )


def _on_cpu(matrix: Tensor, damping: float, act_order: bool) -> Factor:
    """The plain ladder of rescues, where there is more memory."""
    factor = factorize(matrix.cpu(), damping, act_order)
    device = matrix.device
    upper, order, damped, dead = (
        factor.upper.to(device),
        factor.order.to(device),
        factor.damped.to(device),
        factor.dead.to(device),
    )
    return replace(factor, upper=upper, order=order, damped=damped, dead=dead)


def _error(matrix: Tensor, upper: Tensor, order: Tensor, scale: float, damping: float) -> float:
    """Relative error of U^T U (H + lambda I) on a few fixed random directions, in units of ``scale``."""
    probes = torch.randn(len(matrix), _PROBES, generator=torch.Generator().manual_seed(0)).to(matrix.device)
    spread = torch.empty_like(probes)
    spread[order] = probes
    product = (matrix @ spread)[order].div_(scale).add_(probes, alpha=damping)
    error = float((upper.T @ (upper @ product) - probes).norm() / probes.norm())
    return error if error == error else math.inf

"""The algebra of one group in three matrices of the Hessian's size, for groups whose matrices hardly fit in memory.

It is the same algebra as in hessian.py, factor.py and correction.py, with the same results. For 53,248 columns H alone
has 10.6 GiB; the plain functions hold about nine such matrices for a moment, and ten copies of a layer's weights. Here:

* H and G are finished in the memory in which they were summed.
* Where the group has fewer rows than columns, W (G - H) is formed, waits in host memory, and G is freed. Otherwise
  (G - H)(H + lambda I)^-1 is formed in the place of G.
* Where the share of the correction is measured, the noise of G - H goes the same way, until the shares are known; of
  the correction itself the last product, with U, waits until then.
* One permuted copy of H becomes its Cholesky factor, the inverse of that, and U, in place and in panels of columns.
* A layer is solved some rows at a time (rows never interact), with H, H + lambda I and U in memory."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from leangrid.errors import ShapeError
from leangrid.recipe import Recipe
from leangrid.solve.correction import (
    LARGEST,
    bearable_share,
    multiply_by_inverse,
    multiply_by_upper,
    squares,
)
from leangrid.solve.factor import (
    TOLERANCE,
    Factor,
    dead_rescues,
    elimination_order,
    factorize,
    inversion_error,
    invert_triangular_,
    scale_and_dead,
    split_cholesky_,
)
from leangrid.solve.hessian import Hessian, HessianSum, mirror_
from leangrid.solve.layer import LinearResult
from leangrid.solve.rescue import Rescue

PANEL = 2048  # columns of a panel: wide enough for a product at full speed, and a small share of the matrix
TILE_BYTES = 1 << 28  # of one float32 copy of the rows that are solved at once
REVERSED_AT_ONCE = 1 << 26  # numbers


class InPlaceHessianSum(HessianSum):
    """A HessianSum whose ``finish`` returns the memory of the sums; it can be called once."""

    def finish(self) -> Hessian:
        """As HessianSum.finish, bit for bit and with its errors."""
        self._check_tokens()
        self.begin_half(False)
        mirror_(self._matrix).mul_(2.0 / self.tokens)
        if self._cross is not None:
            self._cross.mul_(2.0 / self.tokens)
        self._check_sums(self._matrix, self._cross)
        found = self._finished(self._matrix, self._cross, self._first if self._measures_noise else None)
        self._cross = self._first = None  # the caller owns G and the noise now, and may free them
        return found


class InPlaceGroup:
    """One group of linears: its factor, and the corrected targets of each linear, some rows at a time.

    Args:
        total: sums over the group's tokens; they are finished here.
        weights: every linear of the group, any float dtype and device, [rows, cols].
        strength: a, the share of the inputs' own error that is corrected; None: measured, for each linear.
        panel: columns of a panel; any number gives the same results up to rounding.

    Attributes:
        hessian: H, without G.
        factor: of H.
        shares: a of each linear.

    Raises:
        CalibrationError, NumericalError: as HessianSum.finish.
    """

    def __init__(
        self,
        total: InPlaceHessianSum,
        weights: Mapping[str, Tensor],
        recipe: Recipe,
        strength: float | None,
        panel: int = PANEL,
    ) -> None:
        self._panel = panel
        self._weights = dict(weights)
        self._differences: dict[str, Tensor] = {}  # W (G - H) of each linear, in host memory; whitened with its noise
        self._correction: Tensor | None = None  # (G - H)(H + lambda I)^-1, or whitened (G - H) U^T
        summed = total.finish()
        self.hessian, cross, noise = replace(summed, cross=None, noise=None), summed.cross, summed.noise
        del summed  # or it would keep G
        self._whitened, noises = noise is not None, {}
        if cross is not None:
            cross.sub_(self.hessian.matrix)
            if sum(len(weight) for weight in weights.values()) < total.cols:
                self._differences = {name: self._multiply(weight, cross) for name, weight in weights.items()}
                if noise is not None:
                    noises = {name: self._multiply(weight, noise) for name, weight in weights.items()}
                cross = noise = None
        self.factor = factorize_in_place(self.hessian.matrix, recipe.damping, recipe.act_order, panel)
        fixed = LARGEST if strength is None else strength
        corrected = not self.factor.is_diagonal and (cross is not None or bool(self._differences))
        self.shares = dict.fromkeys(weights, fixed if corrected else 0.0)
        if not corrected:
            return
        if cross is not None:
            multiply = self._whiten if self._whitened else partial(multiply_by_inverse, self.factor)
            for matrix in (cross, *(() if noise is None else (noise,))):
                for start in range(0, total.cols, panel):
                    matrix[start : start + panel] = multiply(matrix[start : start + panel])
            self._correction = cross
        if self._whitened:
            of_group = {} if noise is None else dict.fromkeys(weights, noise)
            self.shares = {name: self._measure(name, found) for name, found in (noises or of_group).items()}

    @property
    def corrects(self) -> bool:
        """Whether the inputs' error is corrected in any of the linears."""
        return self._correction is not None or bool(self._differences)

    def targets(self, name: str, tile: int | None = None, share: tuple[int, int] = (0, 1)) -> Iterator[Tensor]:
        """W~ of one linear, float32 on the device of H, ``tile`` rows after another (None: as TILE_BYTES allows).

        ``share``: only part i of n of the rows; the parts in order are the linear. ``concatenate_results`` joins what
        ``solve_linear`` makes of the tiles; what it decides for a layer (such as rounding instead of a worse result) is
        decided for each tile."""
        (rows, cols), (part, parts) = self._weights[name].shape, share
        tile = tile or max(1, TILE_BYTES // (4 * cols))
        end = rows * (part + 1) // parts
        for start in range(rows * part // parts, end, tile):
            yield self._target(name, start, min(start + tile, end))

    def _multiply(self, weight: Tensor, difference: Tensor) -> Tensor:
        """W (G - H), float32, in host memory."""
        out = torch.empty(weight.shape, dtype=torch.float32)
        for start in range(0, len(weight), self._panel):
            rows = weight[start : start + self._panel].to(difference.device, torch.float32)
            out[start : start + self._panel] = rows @ difference
        return out

    def _whiten(self, rows: Tensor) -> Tensor:
        """rows U^T, columns in original order before, and in elimination order after."""
        return rows.index_select(1, self.factor.order) @ self.factor.upper.T

    def _measure(self, name: str, noise: Tensor) -> float:
        """The share of one linear, by the whitened noise of G - H, or by W times that noise: then it is whitened here,
        and so is the linear's W (G - H)."""
        signal, off, differences = 0.0, 0.0, self._differences.get(name)
        device = self.hessian.matrix.device
        for start in range(0, len(self._weights[name]), self._panel):
            part = slice(start, start + self._panel)
            if differences is not None:
                mine, other = (self._whiten(rows[part].to(device)) for rows in (differences, noise))
                differences[part] = mine
            elif self._correction is not None:
                rows = self._weights[name][part].to(device, torch.float32)
                mine, other = rows @ self._correction, rows @ noise
            else:
                return 0.0
            signal, off = signal + squares(mine), off + squares(other)
        return bearable_share(signal, off)

    def _target(self, name: str, start: int, stop: int) -> Tensor:
        """W~ = W + a W (G - H)(H + lambda I)^-1, rows ``start`` to ``stop``."""
        weight, share = self._weights[name][start:stop].to(self.hessian.matrix.device, torch.float32), self.shares[name]
        if share == 0:
            return weight
        if name in self._differences:
            product = self._differences[name][start:stop].to(weight.device)
        elif self._correction is None:
            return weight
        elif not self._whitened:
            return torch.addmm(weight, weight, self._correction, alpha=share)
        else:
            product = weight @ self._correction
        finish = multiply_by_upper if self._whitened else multiply_by_inverse
        return weight.add(finish(self.factor, product), alpha=share)


def factorize_in_place(
    matrix: Float[Tensor, "cols cols"], damping: float = 0.01, act_order: bool = True, panel: int = PANEL
) -> Factor:
    """As ``factorize``, with one matrix besides its results.

    Where float32 at the damping asked for gives no factor, ``factorize`` itself is called on the CPU.
    """
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ShapeError(f"a Hessian is square, not {tuple(matrix.shape)}", "factorize_in_place")
    scale, mean, dead = scale_and_dead(matrix)
    if not 0 < mean < math.inf:
        return _factorize_on_cpu(matrix, damping, act_order)
    ridge = damping * mean  # lambda / scale
    order = elimination_order((matrix.diagonal() / scale).float(), act_order)
    # J (H + lambda I) J / scale, copied panel by panel; then L, L^-1 and U = J L^-1 J in its place.
    upper = torch.empty_like(matrix)
    last_first = order.flip(0)
    for start in range(0, len(matrix), panel):
        torch.index_select(matrix[last_first[start : start + panel]], 1, last_first, out=upper[start : start + panel])
    upper.div_(scale).diagonal().add_(ridge)
    if not cholesky_(upper, panel):
        del upper
        return _factorize_on_cpu(matrix, damping, act_order)
    reverse_(invert_lower_(upper, panel))

    def multiply_damped(vectors: Tensor) -> Tensor:  # in elimination order, over ``scale`` as U is
        spread = torch.empty_like(vectors)
        spread[order] = vectors
        return (matrix @ spread)[order].div_(scale).add_(vectors, alpha=ridge)

    if not inversion_error(upper, multiply_damped) < TOLERANCE:
        del upper
        return _factorize_on_cpu(matrix, damping, act_order)
    damped = matrix.clone()
    damped.div_(scale).diagonal().add_(ridge)
    rescues = tuple(dead_rescues(dead))
    return Factor(upper.div_(scale**0.5), order, damped.mul_(scale), damping, ridge * scale, dead, rescues)


def cholesky_(matrix: Float[Tensor, "cols cols"], panel: int = PANEL) -> bool:
    """Overwrite a symmetric matrix (its lower triangle is read) by L with L L^T = matrix.

    False where it is not positive definite."""
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
    """Overwrite a lower triangular matrix by its inverse, last panel first: each panel needs the inverse below it."""
    size = len(lower)
    for start in reversed(range(0, size, panel)):
        stop = min(start + panel, size)
        corner = invert_triangular_(lower[start:stop, start:stop])
        below = lower[stop:, start:stop]
        for top in reversed(range(stop, size, panel)):  # the last rows first: they read all rows above them
            bottom = min(top + panel, size)
            lower[top:bottom, start:stop] = (lower[top:bottom, stop:bottom] @ below[: bottom - stop]) @ corner.neg()
    return lower


def reverse_(matrix: Float[Tensor, "cols cols"]) -> Float[Tensor, "cols cols"]:
    """Rows and columns in reverse order, in place: a contiguous matrix read backwards."""
    flat = matrix.view(-1)
    count = flat.numel()
    for start in range(0, count // 2, REVERSED_AT_ONCE):
        stop = min(start + REVERSED_AT_ONCE, count // 2)
        head, tail = flat[start:stop], flat[count - stop : count - start]
        first = head.flip(0)
        head.copy_(tail.flip(0))
        tail.copy_(first)
    return matrix


def concatenate_results(parts: Sequence[LinearResult]) -> LinearResult:
    """The results of consecutive rows as one: losses are added, and rescues of a kind are counted together."""
    if len(parts) == 1:
        return parts[0]
    rescues: dict[str, Rescue] = {}
    for rescue in (r for part in parts for r in part.rescues):
        before = rescues.get(rescue.kind)
        rescues[rescue.kind] = rescue if before is None else replace(before, count=before.count + rescue.count)
    several = tuple(replace(r, detail=f"{r.detail}; {r.count} in all tiles of rows") for r in rescues.values())
    return LinearResult(
        torch.cat([part.codes for part in parts]),
        parts[0].grid.append_rows([part.grid for part in parts[1:]]),
        sum(part.loss for part in parts),
        sum(part.loss_minmax for part in parts),
        sum(part.loss_rounding for part in parts),
        several,
    )


def _factorize_on_cpu(matrix: Tensor, damping: float, act_order: bool) -> Factor:
    """``factorize`` in host memory, its results on the device of ``matrix``."""
    return factorize(matrix.cpu(), damping, act_order).to(matrix.device)

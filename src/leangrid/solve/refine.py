"""After the sweep: refit the grid to the codes by least squares on H, then move codes on the grid, round by round.

W^ is the quantized weight, E = W^ - W, and a row's loss is e H e^T / 2. Both steps work from the gradient E H:

* refit: given the codes, W^ is linear in the grid's parameters (scales, offsets or levels), so the loss is a quadratic
  in them and its minimum solves small normal equations, row by row (grids/least_squares.py).
* descent: given the grid, each code in turn moves to the level nearest to w^_j - (E H)_j / H_jj, the minimum of the
  loss in that one weight. Columns are visited in blocks: one kernel a block, then one product updates the gradient.

Every change is rounded to the stored dtype before it is judged, and each row takes it only if its loss falls."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from leangrid.grids import Grid, Precision
from leangrid.grids.base import FLOAT32

_BLOCK = 128  # columns that one kernel descends


@dataclass(frozen=True, eq=False)
class Refined:
    """Codes, the grid rounded as it is stored, and the float64 loss of each row under H + lambda I."""

    codes: UInt8[Tensor, "rows cols"]
    grid: Grid
    loss: Float[Tensor, " rows"]


def refine(
    target: Float[Tensor, "rows cols"],
    codes: UInt8[Tensor, "rows cols"],
    grid: Grid,
    damped_hessian: Float[Tensor, "cols cols"],
    rounds: int,
    precision: Precision = FLOAT32,
) -> Refined:
    """Refit the grid and move the codes ``rounds`` times, then refit once more. The loss of no row rises.

    Args:
        target: the weights that the codes stand for, float32.
        damped_hessian: H + lambda I, original column order.
        rounds: at least 1.
        precision: how scales, offsets or levels are stored.

    Example:
        >>> from leangrid.grids import fit_minmax
        >>> from leangrid.solve.refine import refine
        >>> weight, codes = torch.tensor([[0.4, 0.45]]), torch.tensor([[0, 1]], dtype=torch.uint8)
        >>> grid, hessian = fit_minmax(torch.tensor([[0.0, 1.0]]), bits=1), torch.tensor([[2.0, 1.0], [1.0, 2.0]])
        >>> refined = refine(weight, codes, grid, hessian, rounds=1)
        >>> refined.grid.dequantize(refined.codes)
        tensor([[0.0000, 0.6500]])
    """
    state = _State.of(target, codes, grid, damped_hessian)
    for _ in range(rounds):
        refitted = _refit(state, damped_hessian, precision)
        state = _descend(_State.of(target, refitted.codes, refitted.grid, damped_hessian), damped_hessian)
    return _refit(state, damped_hessian, precision)


@dataclass(frozen=True, eq=False)
class _State:
    """Codes on a grid, with E = W^ - W, the gradient E H, and twice the loss of each row."""

    codes: Tensor
    grid: Grid
    error: Tensor
    gradient: Tensor
    loss: Tensor

    @classmethod
    def of(cls, target: Tensor, codes: Tensor, grid: Grid, hessian: Tensor) -> "_State":
        error = grid.dequantize(codes).sub_(target)
        gradient = error @ hessian
        return cls(codes, grid, error, gradient, (error * gradient).sum(1))

    def choose_rows(self, other: "_State") -> "_State":
        """``other``, but the rows of this state wherever their loss did not fall."""
        worse = ~(other.loss < self.loss)
        if not bool(worse.any()):
            return other
        mine, rows = worse[:, None], worse.nonzero().squeeze(1)
        same_grid = other.grid is self.grid
        return _State(
            torch.where(mine, self.codes, other.codes),
            other.grid if same_grid else other.grid.replace_rows(rows, self.grid.select_rows(rows)),
            torch.where(mine, self.error, other.error),
            torch.where(mine, self.gradient, other.gradient),
            torch.where(worse, self.loss, other.loss),
        )


def _refit(state: _State, hessian: Tensor, precision: Precision) -> Refined:
    """The least-squares grid given the codes, in the rows whose loss it lowers.

    The normal equations say by how much a rounded step changes the loss, so no product with H is needed to judge it."""
    codes, grid, change = state.grid.refit(state.codes, state.gradient, hessian, precision)
    worse = (~(change < 0)).nonzero().squeeze(1)
    if len(worse):
        grid = grid.replace_rows(worse, state.grid.select_rows(worse))
        codes = codes.index_copy(0, worse, state.codes[worse])
    return Refined(codes, grid, (state.loss.double() + change.clamp(max=0)) / 2)


def _descend(state: _State, hessian: Tensor) -> _State:
    """One pass over all columns: each code moves to its best level, given all others."""
    grid, cols = state.grid, state.codes.shape[1]
    codes, error, gradient = state.codes.clone(), state.error.clone(), state.gradient.clone()
    group = grid.group_of(cols)
    for start in range(0, cols, _BLOCK):
        part = slice(start, min(start + _BLOCK, cols))
        # Inside the block, column by column; the kernel updates the block's own gradient as it goes.
        slope, corner = gradient[:, part].contiguous(), hessian[part, part].contiguous()
        codes[:, part], change = grid.descend_block(slope, corner, state.codes[:, part].contiguous(), group[part])
        # Then the gradient of all columns: (E + change) H.
        error[:, part] += change
        gradient.addmm_(change, hessian[part])
    return state.choose_rows(_State(codes, grid, error, gradient, (error * gradient).sum(1)))

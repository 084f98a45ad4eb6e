"""The two ways to choose codes so that later columns make up for the errors of earlier ones.

``sweep`` is LeanQuant's Algorithm 1, which is GPTQ on a given grid: one elimination order for all rows. With
(H + lambda I)^-1 = U^T U, columns in elimination order, for j = 0, 1, 2, ...:

    q_j = nearest level to w_j             quantize the column
    e   = (w_j - q_j) / U_jj               its error, in units of what the rest can compensate
    w_k = w_k - e U_jk   for all k > j     move the error to the columns that are still free

The sum of e^2 / 2 over the columns of a row is its loss under H + lambda I. Rows never interact. In blocks, for speed:

        done          block         later columns
    +-----------+---------------+-------------------+
    | q q q q q | q q q w w w w | w w w w w w w w w |   1. One kernel quantizes the block column by column;
    | q q q q q | q q q w w w w | w w w w w w w w w |      each error goes to the columns on its right.
    | q q q q q |     e ------> |                   |
    +-----------+---------------+-------------------+
                  e e e e e e e  ---------------->       2. One product moves the block's errors to all later
                                                            columns: w -= e @ U[block, later].

``exact_sweep`` is LeanQuant-Exact, Algorithm 2: each row quantizes the column that costs least next."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from leangrid.grids import Grid
from leangrid.solve.factor import Factor

BLOCK = 128  # columns that one kernel sweeps; any number gives the same codes up to rounding


@dataclass(frozen=True, eq=False)
class Swept:
    """``codes`` uint8 [rows, cols], original column order; ``loss`` float64 [rows], of each row under H + lambda I."""

    codes: UInt8[Tensor, "rows cols"]
    loss: Float[Tensor, " rows"]


def sweep(weight: Float[Tensor, "rows cols"], factor: Factor, grid: Grid) -> Swept:
    """Quantize ``weight`` onto ``grid`` column by column, each error moved to the columns that follow (Algorithm 1).

    Args:
        weight: any float dtype, original column order.
        factor: U and the elimination order.
        grid: its groups are those of the original column order.

    Example:
        >>> from leangrid.grids import fit_minmax
        >>> from leangrid.solve.factor import factorize
        >>> from leangrid.solve.sweep import sweep
        >>> factor = factorize(torch.tensor([[2.0, 1.0], [1.0, 2.0]]), damping=0.0)
        >>> weight, grid = torch.tensor([[0.4, 0.45]]), fit_minmax(torch.tensor([[0.0, 1.0]]), bits=1)
        >>> grid.nearest(weight)
        tensor([[0, 0]], dtype=torch.uint8)
        >>> sweep(weight, factor, grid).codes  # the second weight makes up for the first one's error
        tensor([[0, 1]], dtype=torch.uint8)
    """
    cols, upper = weight.shape[1], factor.upper
    # Columns, and the group of each, in elimination order.
    current = weight.float()[:, factor.order].contiguous()
    group = grid.group_of(cols)[factor.order]
    codes = torch.empty_like(current, dtype=torch.uint8)
    loss = torch.zeros(weight.shape[0], dtype=torch.float64, device=weight.device)
    for start in range(0, cols, BLOCK):
        stop = min(start + BLOCK, cols)
        # Quantize the block, and move each column's error to the columns on its right inside it.
        part, corner = current[:, start:stop].contiguous(), upper[start:stop, start:stop].contiguous()
        codes[:, start:stop], error = grid.sweep_block(part, corner, group[start:stop])
        loss += error.square().sum(1)
        # Move the block's errors to all later columns: w_k -= sum_j e_j U_jk.
        if stop < cols:
            current[:, stop:].addmm_(error, upper[start:stop, stop:], alpha=-1)
    # Back to the original column order.
    return Swept(codes[:, torch.argsort(factor.order)], loss / 2)


def exact_sweep(weight: Float[Tensor, "rows cols"], factor: Factor, grid: Grid) -> Swept:
    """Quantize ``weight`` onto ``grid``, in each row always the column next that costs least (Algorithm 2), in float64.

    With A = (H + lambda I)^-1 of the columns that are left, a row quantizes j = argmin (w_j - q_j)^2 / (2 A_jj), moves
    the error to the others by w -= (w_j - q_j) A_j / A_jj, and takes j out of A. Each row has its own order and so its
    own A: n^3 / 6 multiplications a row, which is practical for layers as wide as BERT's.

    Example:
        >>> from leangrid.grids import fit_minmax
        >>> from leangrid.solve.factor import factorize
        >>> from leangrid.solve.sweep import exact_sweep
        >>> factor = factorize(torch.tensor([[2.0, 1.0], [1.0, 2.0]]), damping=0.0)
        >>> weight, grid = torch.tensor([[0.4, 0.45]]), fit_minmax(torch.tensor([[0.0, 1.0]]), bits=1)
        >>> exact_sweep(weight, factor, grid).codes
        tensor([[0, 1]], dtype=torch.uint8)
    """
    return Swept(*grid.sweep_exact(weight.float(), factor.inverse()))

"""The sweep (LeanQuant Algorithm 1, OBQ/GPTQ in blocks): quantize column after column, push the error to the right.

For each column j in elimination order: q_j = nearest level, e = (w_j - q_j) / U_jj, w_k -= e U_jk for k > j. A block of
columns is swept by one kernel that touches nothing else; one GEMM then updates all later columns. Rows never interact.
eps_j = e^2 / 2, and sum_j eps_j is the layer loss under H + lambda I.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from leangrid.grids import Grid
from leangrid.solve.factor import Factor


@dataclass(frozen=True, eq=False)
class Swept:
    """``codes`` uint8 [rows, cols] in original column order; ``loss`` float64 [rows], the sum of eps of each row."""

    codes: UInt8[Tensor, "rows cols"]
    loss: Float[Tensor, " rows"]


def sweep(weight: Float[Tensor, "rows cols"], factor: Factor, grid: Grid, block: int = 128) -> Swept:
    """Quantize ``weight`` onto ``grid`` with error propagation; any ``block`` gives the same codes up to rounding.

    Groups are those of the original column order, whatever the elimination order.
    """
    cols, upper = weight.shape[1], factor.upper
    current = weight.float()[:, factor.order].contiguous()
    codes = torch.empty_like(current, dtype=torch.uint8)
    loss = torch.zeros(weight.shape[0], dtype=torch.float64, device=weight.device)
    group = grid.group_of(cols)[factor.order]
    for start in range(0, cols, block):
        stop = min(start + block, cols)
        part, corner = current[:, start:stop].contiguous(), upper[start:stop, start:stop].contiguous()
        chosen, error = grid.sweep_block(part, corner, group[start:stop])
        codes[:, start:stop] = chosen
        loss += error.square().sum(1)
        if stop < cols:
            current[:, stop:].addmm_(error, upper[start:stop, stop:], alpha=-1)
    return Swept(codes[:, torch.argsort(factor.order)], loss / 2)

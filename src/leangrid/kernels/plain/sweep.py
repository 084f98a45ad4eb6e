"""The sweep of Algorithm 1 inside one block of columns, in plain torch: the twin of cpu/sweep.h and triton/sweep.py.

Every element sees its updates in column order, each a rounded product and a rounded sum, so the C++ gives the same
bits."""

import torch
from jaxtyping import Float32, Integer, UInt8
from torch import Tensor

from leangrid.kernels.plain.nearest import AffineGrid, Grid, LevelGrid, OffsetGrid


def _sweep(weight: Tensor, upper: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    # Columns as rows of a copy, so that every step reads and writes contiguous memory.
    remaining = weight.T.clone(memory_format=torch.contiguous_format)
    codes = torch.empty(remaining.shape, dtype=torch.uint8, device=weight.device)
    errors = torch.empty_like(remaining)
    for j in range(len(remaining)):
        # Quantize column j: the nearest level of each row.
        code = grid.code(remaining[j], j)
        # Its error, scaled by the diagonal of U: e = (w_j - q_j) / U_jj.
        error = (remaining[j] - grid.value(code, j)) / upper[j, j]
        codes[j], errors[j] = code.to(torch.uint8), error
        # The later columns of the block compensate for it: w_k -= U_jk e for k > j.
        remaining[j + 1 :] -= upper[j, j + 1 :, None] * error
    return codes.T.contiguous(), errors.T.contiguous()


def sweep_levels(weight: Float32[Tensor, "rows b"], upper: Float32[Tensor, "b b"], levels: Float32[Tensor, "rows k"]
                 ) -> tuple[UInt8[Tensor, "rows b"], Float32[Tensor, "rows b"]]:  # fmt: skip
    """See ``leangrid.kernels.sweep_levels``."""
    return _sweep(weight, upper, LevelGrid(levels))


def sweep_affine(weight: Float32[Tensor, "rows b"], upper: Float32[Tensor, "b b"], scale: Float32[Tensor, "rows g"],
                 zero_point: UInt8[Tensor, "rows g"], group: Integer[Tensor, "b"], bits: int
                 ) -> tuple[UInt8[Tensor, "rows b"], Float32[Tensor, "rows b"]]:  # fmt: skip
    """See ``leangrid.kernels.sweep_affine``."""
    return _sweep(weight, upper, AffineGrid(scale, zero_point, group, bits))


def sweep_offset(weight: Float32[Tensor, "rows b"], upper: Float32[Tensor, "b b"], scale: Float32[Tensor, "rows g"],
                 offset: Float32[Tensor, "rows g"], group: Integer[Tensor, "b"], bits: int
                 ) -> tuple[UInt8[Tensor, "rows b"], Float32[Tensor, "rows b"]]:  # fmt: skip
    """See ``leangrid.kernels.sweep_offset``."""
    return _sweep(weight, upper, OffsetGrid(scale, offset, group, bits))

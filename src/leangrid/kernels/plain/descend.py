"""One round of cyclic coordinate descent on the codes of a block of columns, in plain torch: the twin of cpu/sweep.h
and triton/descend.py, with the same bits as the C++."""

import torch
from jaxtyping import Float32, Integer, UInt8
from torch import Tensor

from leangrid.kernels.plain.nearest import AffineGrid, Grid, LevelGrid, OffsetGrid

NEARER = 1.0 - 1e-6  # a code changes only where its new distance is below this share of the old: float32 noise is not


def _descend(gradient: Tensor, hessian: Tensor, codes: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    # Columns as rows of a copy, so that every step reads and writes contiguous memory.
    slope = gradient.T.clone(memory_format=torch.contiguous_format)
    codes = codes.T.clone(memory_format=torch.contiguous_format)
    change = torch.zeros_like(slope)
    curved = (hessian.diagonal() > 0).tolist()
    for j in range(len(slope)):
        if not curved[j]:
            continue
        # Where the loss would be least if column j alone were free: q_j - gradient_j / h_jj.
        current = grid.value(codes[j], j)
        target = current - slope[j] / hessian[j, j]
        # Its nearest level, taken where it is nearer than the current one.
        code = grid.code(target, j)
        new = grid.value(code, j)
        moves = (target - new).abs() < (target - current).abs() * NEARER
        change[j] = torch.where(moves, new - current, 0.0)
        codes[j] = torch.where(moves, code.to(torch.uint8), codes[j])
        # The gradients of the block's later columns after that change.
        slope[j + 1 :] += hessian[j, j + 1 :, None] * change[j]
    return codes.T.contiguous(), change.T.contiguous()


def descend_levels(gradient: Float32[Tensor, "rows b"], hessian: Float32[Tensor, "b b"], codes: UInt8[Tensor, "rows b"],
                   levels: Float32[Tensor, "rows k"]
                   ) -> tuple[UInt8[Tensor, "rows b"], Float32[Tensor, "rows b"]]:  # fmt: skip
    """See ``leangrid.kernels.descend_levels``."""
    return _descend(gradient, hessian, codes, LevelGrid(levels))


def descend_affine(gradient: Float32[Tensor, "rows b"], hessian: Float32[Tensor, "b b"], codes: UInt8[Tensor, "rows b"],
                   scale: Float32[Tensor, "rows g"], zero_point: UInt8[Tensor, "rows g"], group: Integer[Tensor, "b"],
                   bits: int) -> tuple[UInt8[Tensor, "rows b"], Float32[Tensor, "rows b"]]:  # fmt: skip
    """See ``leangrid.kernels.descend_affine``."""
    return _descend(gradient, hessian, codes, AffineGrid(scale, zero_point, group, bits))


def descend_offset(gradient: Float32[Tensor, "rows b"], hessian: Float32[Tensor, "b b"], codes: UInt8[Tensor, "rows b"],
                   scale: Float32[Tensor, "rows g"], offset: Float32[Tensor, "rows g"], group: Integer[Tensor, "b"],
                   bits: int) -> tuple[UInt8[Tensor, "rows b"], Float32[Tensor, "rows b"]]:  # fmt: skip
    """See ``leangrid.kernels.descend_offset``."""
    return _descend(gradient, hessian, codes, OffsetGrid(scale, offset, group, bits))

"""One round of cyclic coordinate descent inside a block of columns on a GPU: the twin of plain/descend.py.

Tiles and the order of operations are those of sweep.py, so the bits are those of plain torch."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float32, Integer, UInt8
from torch import Tensor

from leangrid.kernels.plain.descend import NEARER
from leangrid.kernels.triton.nearest import (
    FEW,
    LAUNCH,
    ROWS,
    affine_kind,
    column_grid,
    level_kind,
    level_of,
    level_tile,
    nearest,
    offset_kind,
)


@triton.jit
@no_type_check
def descend_kernel(gradient, hessian, old, levels, scale, zero, group, codes, deltas, rows, cols, groups,
                   NEARER: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, KIND: tl.constexpr, R: tl.constexpr,
                   C: tl.constexpr):  # fmt: skip
    """R rows: ``old`` codes in, new codes u8 and the changes of Q f32 [rows, cols] out."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    live = row < rows
    base = row.to(tl.int64) * cols
    lane = tl.arange(0, C)
    if KIND == FEW:
        value, lower = level_tile(levels, row, live, K, WIDTH)
    else:
        value, lower = 0.0, 0.0
    for start in range(0, cols, C):
        column = start + lane
        inside = column < cols
        spot = base[:, None] + column[None, :]
        mask = live[:, None] & inside[None, :]
        slope = tl.load(gradient + spot, mask=mask, other=0.0)
        # The gradients of these columns after the changes of all earlier ones.
        for earlier in range(0, start, C):
            for t in tl.static_range(C):
                delta = tl.load(deltas + base + (earlier + t), mask=live, other=0.0)
                across = tl.load(hessian + (earlier + t) * cols + column, mask=inside, other=0.0)
                slope += across[None, :] * delta[:, None]
        chosen, mine = tl.zeros([R, C], tl.int32), tl.zeros([R, C], tl.float32)
        for t in tl.static_range(C):
            j = tl.minimum(start + t, cols - 1)  # past the end: the last column again, not stored
            here = (lane == t)[None, :]
            before = tl.load(old + base + j, mask=live, other=0).to(tl.int32)
            s, z = column_grid(scale, zero, group, j, row, live, groups, KIND)
            now = level_of(before, s, z, levels, row, live, K, KIND)
            curvature = tl.zeros([R], tl.float32) + tl.load(hessian + j * cols + j)
            x = tl.sum(tl.where(here, slope, 0.0), 1)
            # Where the loss would be least if column j alone were free, and its nearest level.
            target = now - tl.div_rn(x, tl.where(curvature > 0, curvature, 1.0))
            code, new = nearest(target, s, z, value, lower, levels, row, live, K, WIDTH, KIND)
            move = (tl.abs(target - new) < tl.abs(target - now) * NEARER) & (curvature > 0)
            delta = tl.where(move, new - now, 0.0)
            across = tl.load(hessian + j * cols + column, mask=inside, other=0.0)
            slope += across[None, :] * delta[:, None]  # columns up to j change too, and are never read again
            chosen = tl.where(here, tl.where(move, code, before)[:, None], chosen)
            mine = tl.where(here, delta[:, None], mine)
        tl.store(codes + spot, chosen.to(tl.uint8), mask=mask)
        tl.store(deltas + spot, mine, mask=mask)
        tl.debug_barrier()  # the next sixteen columns read these changes from other lanes


def descend_levels(gradient: Float32[Tensor, "rows b"], hessian: Float32[Tensor, "b b"], codes: UInt8[Tensor, "rows b"],
                   levels: Float32[Tensor, "rows k"]
                   ) -> tuple[UInt8[Tensor, "rows b"], Float32[Tensor, "rows b"]]:  # fmt: skip
    """See ``leangrid.kernels.descend_levels``, which checks the inputs."""
    new, delta = torch.empty_like(codes), torch.empty_like(gradient)
    rows, cols = codes.shape
    if codes.numel():
        with torch.cuda.device_of(codes):
            descend_kernel[(triton.cdiv(rows, ROWS),)](
                gradient,
                hessian,
                codes,
                levels,
                levels,
                codes,
                codes,
                new,
                delta,
                rows,
                cols,
                1,
                NEARER,
                **level_kind(levels),
                **LAUNCH,
            )
    return new, delta


def descend_affine(gradient: Float32[Tensor, "rows b"], hessian: Float32[Tensor, "b b"], codes: UInt8[Tensor, "rows b"],
                   scale: Float32[Tensor, "rows g"], zero_point: UInt8[Tensor, "rows g"], group: Integer[Tensor, "b"],
                   bits: int) -> tuple[UInt8[Tensor, "rows b"], Float32[Tensor, "rows b"]]:  # fmt: skip
    """See ``leangrid.kernels.descend_affine``, which checks the inputs."""
    return _descend_groups(gradient, hessian, codes, scale, zero_point, group, affine_kind(bits))


def descend_offset(gradient: Float32[Tensor, "rows b"], hessian: Float32[Tensor, "b b"], codes: UInt8[Tensor, "rows b"],
                   scale: Float32[Tensor, "rows g"], offset: Float32[Tensor, "rows g"], group: Integer[Tensor, "b"],
                   bits: int) -> tuple[UInt8[Tensor, "rows b"], Float32[Tensor, "rows b"]]:  # fmt: skip
    """See ``leangrid.kernels.descend_offset``, which checks the inputs."""
    return _descend_groups(gradient, hessian, codes, scale, offset, group, offset_kind(bits))


def _descend_groups(
    gradient: Tensor, hessian: Tensor, codes: Tensor, scale: Tensor, second: Tensor, group: Tensor, kind: dict[str, int]
) -> tuple[Tensor, Tensor]:
    """Either grid of groups; ``second`` is its zero point or its offset."""
    new, delta = torch.empty_like(codes), torch.empty_like(gradient)
    rows, cols = codes.shape
    if codes.numel():
        with torch.cuda.device_of(codes):
            descend_kernel[(triton.cdiv(rows, ROWS),)](
                gradient,
                hessian,
                codes,
                scale,
                scale,
                second,
                group,
                new,
                delta,
                rows,
                cols,
                scale.shape[1],
                NEARER,
                **kind,
                **LAUNCH,
            )
    return new, delta

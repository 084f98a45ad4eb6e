"""The sweep of Algorithm 1 inside one block of columns on a GPU, the twin of plain/sweep.py: one launch a block, one
program for each tile of rows.

The time is bound by 128 columns one after another, each a chain of look-up, division and update of about 200 cycles:
about 20 us a block however few rows there are; then by the arithmetic. Three layouts were compared for 4096 rows x 128
columns:

* a lane for each row: no exchange between lanes, but 128 registers of weights and one warp an SM; reading column j out
  of registers costs a select and an add for each of the 128, as much as the update itself;
* a warp for each row (what Triton makes of a [rows, 128] tile): five shuffles to read a column, look-up and division
  repeated in 32 lanes: about 70 warp instructions a row and column;
* used here, sixteen columns at a time: an [8, 16] tile has four lanes for each row, so two shuffles read a column and
  look-up and division are repeated only four times. A program is one warp, so none waits for another (4096 rows: 512
  warps for the 528 schedulers of an H200). Before its sixteen columns a tile applies the errors of all earlier columns,
  which this program has just written; those updates do not depend on each other, so their loads overlap, and only the
  triangle j < k is computed. About 17 warp instructions a row and column (counted in the machine code for sm_90; no
  spills, no shared memory).

A tl.dot of rank 16 would cost less, but it sums in another order. Here every weight sees its updates in column order,
each a rounded product and a rounded sum, and divisions are IEEE, so the bits are those of plain torch (also for
subnormal numbers; a zero may lose its sign)."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float32, Integer, UInt8
from torch import Tensor

from leangrid.kernels.triton.nearest import (
    FEW,
    LAUNCH,
    ROWS,
    affine_kind,
    column_grid,
    level_kind,
    level_tile,
    nearest,
    offset_kind,
)


@triton.jit
@no_type_check
def sweep_kernel(weight, upper, levels, scale, zero, group, codes, errors, rows, cols, groups, K: tl.constexpr,
                 WIDTH: tl.constexpr, KIND: tl.constexpr, R: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """R rows, C columns at a time: codes u8 and scaled errors f32 [rows, cols] of weight [rows, cols]."""
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
        left = tl.load(weight + spot, mask=mask, other=0.0)
        # The updates of these columns by the errors of all earlier ones: w_k -= U_jk e_j.
        for earlier in range(0, start, C):
            for t in tl.static_range(C):
                error = tl.load(errors + base + (earlier + t), mask=live, other=0.0)
                across = tl.load(upper + (earlier + t) * cols + column, mask=inside, other=0.0)
                left -= across[None, :] * error[:, None]
        chosen, mine = tl.zeros([R, C], tl.int32), tl.zeros([R, C], tl.float32)
        for t in tl.static_range(C):
            j = tl.minimum(start + t, cols - 1)  # past the end: the last column again, not stored
            here = (lane == t)[None, :]
            s, z = column_grid(scale, zero, group, j, row, live, groups, KIND)
            # Column j: its nearest level, its scaled error, and the updates of the columns after it in this tile.
            x = tl.sum(tl.where(here, left, 0.0), 1)
            code, level = nearest(x, s, z, value, lower, levels, row, live, K, WIDTH, KIND)
            error = tl.div_rn(x - level, tl.load(upper + j * cols + j))
            across = tl.load(upper + j * cols + column, mask=inside, other=0.0)
            left -= across[None, :] * error[:, None]  # columns up to j change too, and are never read again
            chosen, mine = tl.where(here, code[:, None], chosen), tl.where(here, error[:, None], mine)
        tl.store(codes + spot, chosen.to(tl.uint8), mask=mask)
        tl.store(errors + spot, mine, mask=mask)
        tl.debug_barrier()  # the next sixteen columns read these errors from other lanes


def sweep_levels(weight: Float32[Tensor, "rows b"], upper: Float32[Tensor, "b b"], levels: Float32[Tensor, "rows k"]
                 ) -> tuple[UInt8[Tensor, "rows b"], Float32[Tensor, "rows b"]]:  # fmt: skip
    """See ``leangrid.kernels.sweep_levels``, which checks the inputs."""
    codes, errors = torch.empty_like(weight, dtype=torch.uint8), torch.empty_like(weight)
    rows, cols = codes.shape
    if codes.numel():
        with torch.cuda.device_of(codes):
            sweep_kernel[(triton.cdiv(rows, ROWS),)](
                weight,
                upper,
                levels,
                levels,
                codes,
                codes,
                codes,
                errors,
                rows,
                cols,
                1,
                **level_kind(levels),
                **LAUNCH,
            )
    return codes, errors


def sweep_affine(weight: Float32[Tensor, "rows b"], upper: Float32[Tensor, "b b"], scale: Float32[Tensor, "rows g"],
                 zero_point: UInt8[Tensor, "rows g"], group: Integer[Tensor, "b"],
                 bits: int) -> tuple[UInt8[Tensor, "rows b"], Float32[Tensor, "rows b"]]:  # fmt: skip
    """See ``leangrid.kernels.sweep_affine``, which checks the inputs."""
    return _sweep_groups(weight, upper, scale, zero_point, group, affine_kind(bits))


def sweep_offset(weight: Float32[Tensor, "rows b"], upper: Float32[Tensor, "b b"], scale: Float32[Tensor, "rows g"],
                 offset: Float32[Tensor, "rows g"], group: Integer[Tensor, "b"],
                 bits: int) -> tuple[UInt8[Tensor, "rows b"], Float32[Tensor, "rows b"]]:  # fmt: skip
    """See ``leangrid.kernels.sweep_offset``, which checks the inputs."""
    return _sweep_groups(weight, upper, scale, offset, group, offset_kind(bits))


def _sweep_groups(
    weight: Tensor, upper: Tensor, scale: Tensor, second: Tensor, group: Tensor, kind: dict[str, int]
) -> tuple[Tensor, Tensor]:
    """Either grid of groups; ``second`` is its zero point or its offset."""
    codes, errors = torch.empty_like(weight, dtype=torch.uint8), torch.empty_like(weight)
    rows, cols = codes.shape
    if codes.numel():
        with torch.cuda.device_of(codes):
            sweep_kernel[(triton.cdiv(rows, ROWS),)](
                weight, upper, scale, scale, second, group, codes, errors, rows, cols, scale.shape[1], **kind, **LAUNCH
            )
    return codes, errors

"""What the sweep and the descent share on a GPU: the level nearest to a number, and the level of a code. The twin of
plain/nearest.py.

The kind of grid is chosen at compile time (KIND): AFFINE, levels S (q - Z) of the column's group; OFFSET, levels
S q + B of the column's group; FEW, up to 16 levels of the row, in registers; MANY, up to 256 levels of the row, found
by bisection, which costs eight dependent loads instead of 256 registers."""

from typing import no_type_check

import triton
import triton.language as tl
from torch import Tensor

AFFINE, OFFSET, FEW, MANY = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
MOST_IN_REGISTERS = 16

# Sixteen columns at a time, eight rows a program, one warp: four lanes hold a row's sixteen columns (see sweep.py).
ROWS, COLUMNS = 8, 16
# No fused multiply-add: with IEEE division the results are then the bits of plain torch.
LAUNCH = {"num_warps": 1, "num_stages": 1, "enable_fp_fusion": False}


def level_kind(levels: Tensor) -> dict[str, int]:
    """Compile-time arguments for levels of each row's own, f32 [rows, K]."""
    count = levels.shape[1]
    few = count <= MOST_IN_REGISTERS
    return {
        "KIND": 2 if few else 3,
        "K": count,
        "WIDTH": max(4, triton.next_power_of_2(count)),
        "R": ROWS,
        "C": COLUMNS,
    }


def affine_kind(bits: int) -> dict[str, int]:
    """Compile-time arguments for levels S (q - Z) of ``bits`` bits."""
    return {"KIND": 0, "K": 2**bits, "WIDTH": 1, "R": ROWS, "C": COLUMNS}


def offset_kind(bits: int) -> dict[str, int]:
    """Compile-time arguments for levels S q + B of ``bits`` bits."""
    return {**affine_kind(bits), "KIND": 1}


@triton.jit
@no_type_check
def level_tile(levels, row, live, K: tl.constexpr, WIDTH: tl.constexpr):
    """The row's levels [R, WIDTH] and the midpoint below each, which is infinite behind the last level."""
    index = tl.arange(0, WIDTH)[None, :]
    spot = levels + row.to(tl.int64)[:, None] * K + index
    inside = live[:, None] & (index < K)
    value = tl.load(spot, mask=inside, other=0.0)
    below = tl.load(spot - 1, mask=inside & (index > 0), other=0.0)
    return value, tl.where(index < K, 0.5 * below + 0.5 * value, float("inf"))


@triton.jit
@no_type_check
def column_grid(scale, zero, group, j, row, live, groups, KIND: tl.constexpr):
    """S and Z, or S and B, of column j's group, float32 [R]; 1 and 0 for grids without groups."""
    if KIND < FEW:
        spot = row.to(tl.int64) * groups + tl.load(group + j)
        s = tl.load(scale + spot, mask=live, other=1.0)
        z = tl.load(zero + spot, mask=live, other=0).to(tl.float32)
    else:
        s, z = 1.0, 0.0
    return s, z


@triton.jit
@no_type_check
def nearest(x, s, z, value, lower, levels, row, live, K: tl.constexpr, WIDTH: tl.constexpr, KIND: tl.constexpr):
    """Code (int32) and value of the level nearest to x [R]; ties as in plain torch."""
    if KIND == AFFINE:
        target = tl.minimum(tl.maximum(tl.div_rn(x, s) + z, 0.0), K - 1.0)
        target = (target + 12582912.0) - 12582912.0  # 1.5 * 2^23: rounds half to even, as rint does, on any backend
        code = target.to(tl.int32)
        level = s * (target - z)
    elif KIND == OFFSET:
        target = tl.minimum(tl.maximum(tl.div_rn(x - z, s), 0.0), K - 1.0)
        target = (target + 12582912.0) - 12582912.0
        code = target.to(tl.int32)
        level = s * target + z
    elif KIND == FEW:
        index = tl.arange(0, WIDTH)[None, :]
        passed = (x[:, None] > lower) | (index == 0)
        code = tl.sum(passed.to(tl.int32), 1) - 1
        level = tl.max(tl.where(passed, value, float("-inf")), 1)  # levels ascend: the largest one passed
    else:
        base = levels + row.to(tl.int64) * K
        code = tl.zeros_like(row)
        # Not unrolled: the sixteen columns already are, and the compiler would need minutes.
        for halving in range(1, 9):
            step = WIDTH >> halving
            probe = code + step
            inside = live & (probe < K) & (probe > code)
            high = tl.load(base + probe, mask=inside, other=0.0)
            low = tl.load(base + probe - 1, mask=inside, other=0.0)
            code = tl.where(inside & (x > 0.5 * low + 0.5 * high), probe, code)
        level = tl.load(base + code, mask=live, other=0.0)
    return code, level


@triton.jit
@no_type_check
def level_of(code, s, z, levels, row, live, K: tl.constexpr, KIND: tl.constexpr):
    """The level that a code [R] stands for."""
    if KIND == AFFINE:
        level = s * (code.to(tl.float32) - z)
    elif KIND == OFFSET:
        level = s * code.to(tl.float32) + z
    else:
        level = tl.load(levels + row.to(tl.int64) * K + code, mask=live, other=0.0)
    return level

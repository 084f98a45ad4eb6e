"""P^T H P of every row on a GPU, P the one-hot matrix of its codes, without P or P^T H in memory.

plain/level_gram.py multiplies one-hot rows with H in float32: 2 rows K n^2 operations, 2.2e12 for a 4096 x 4096 layer
with 16 levels, tens of milliseconds without tensor cores; float16 or bfloat16 would not be exact enough. Here H is
split into three bfloat16 terms that add up to its 24 bits: products with zeros and ones are exact, and tensor cores add
in float32. H is symmetric, so only tiles J <= I are multiplied: P^T H P = S + S^T with S = sum_I (sum_{J<I} P_J^T H_JI
+ P_I^T H_II / 2) P_I. That is 1.5 times the operations, at bfloat16's rate, about 16 times float32's. The last product
with P_I is a masked sum, in float64 over I."""

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float32, Float64, UInt8
from torch import Tensor

from leangrid.kernels.plain import level_gram as plain_level_gram
from leangrid.kernels.triton.packed import interpreted

M, N, J = 128, 128, 64  # (row, level) pairs, columns i and columns j of a tile
# Two stages fit the 99 KiB of shared memory of an L40S.
LAUNCH: dict[str, Any] = {"num_warps": 8, "num_stages": 2, "enable_fp_fusion": True}
PANEL = 4096  # columns of H that are split into terms at once
MOST_LEVELS = 16  # with more, accumulators spill to memory


@triton.jit
@no_type_check
def level_gram_kernel(panel, codes, out, rows, n, begin, width, levels, TERMS: tl.constexpr, WIDE: tl.constexpr,
                      M: tl.constexpr, N: tl.constexpr, J: tl.constexpr):  # fmt: skip
    """out[row, k, l] += the part of S of columns begin .. begin + width; panel [TERMS, n, width] holds these columns of
    H."""
    pair = tl.arange(0, M)
    row, level = tl.program_id(0) * (M // WIDE) + pair // WIDE, pair % WIDE
    live = (row < rows) & (level < levels)
    base = tl.minimum(row, rows - 1).to(tl.int64) * n
    index = tl.arange(0, WIDE)
    total = tl.zeros([M, WIDE], tl.float64)
    for i in range(0, width, N):
        inner = i + tl.arange(0, N)
        acc = tl.zeros([M, N], tl.float32)
        for j in range(0, begin + i + N, J):
            outer = j + tl.arange(0, J)
            inside = outer < n
            code = tl.load(codes + base[:, None] + outer[None, :], mask=live[:, None] & inside[None, :], other=255)
            share = tl.where(outer < begin + i, 1.0, 0.5)  # the tile on the diagonal counts in S and in its transpose
            hot = tl.where(code.to(tl.int32) == level[:, None], share[None, :], 0.0).to(panel.dtype.element_ty)
            spot = outer.to(tl.int64)[:, None] * width + inner[None, :]
            mask = inside[:, None] & (inner < width)[None, :]
            for term in tl.static_range(TERMS):
                part = tl.load(panel + tl.full([], term, tl.int64) * n * width + spot, mask=mask, other=0.0)
                acc = tl.dot(hot, part, acc, input_precision="ieee")
        column = begin + inner
        here = tl.load(
            codes + base[:, None] + column[None, :], mask=live[:, None] & (inner < width)[None, :], other=255
        ).to(tl.int32)
        for k in range(0, levels):
            mass = tl.sum(tl.where(here == k, acc, 0.0), 1).to(tl.float64)
            total += tl.where((index == k)[None, :], mass[:, None], 0.0)
    spot = out + (row.to(tl.int64) * levels + level)[:, None] * levels + index[None, :]
    mask = live[:, None] & (index < levels)[None, :]
    tl.store(spot, tl.load(spot, mask=mask, other=0.0) + total, mask=mask)


def split_into_terms(panel: Float32[Tensor, "n width"]) -> Tensor:
    """Three bfloat16 matrices that add up to the panel, [3, n, width]; in Triton's interpreter, which cannot multiply
    bfloat16, the panel alone, f32 [1, n, width]."""
    if interpreted():
        return panel[None].contiguous()
    high = panel.bfloat16()
    rest = panel - high.float()
    middle = rest.bfloat16()
    return torch.stack([high, middle, (rest - middle.float()).bfloat16()])


def level_gram(
    hessian: Float32[Tensor, "n n"], codes: UInt8[Tensor, "rows n"], levels: int
) -> Float64[Tensor, "rows k k"]:
    """See ``leangrid.kernels.level_gram``, which checks the inputs. More than 16 levels run in plain torch."""
    rows, n = codes.shape
    if levels > MOST_LEVELS or codes.numel() == 0:
        return plain_level_gram(hessian, codes, levels)
    out = torch.zeros(rows, levels, levels, dtype=torch.float64, device=hessian.device)
    wide = max(4, triton.next_power_of_2(levels))
    with torch.cuda.device_of(hessian):
        for begin in range(0, n, PANEL):
            panel = split_into_terms(hessian[:, begin : begin + PANEL])
            sizes = rows, n, begin, panel.shape[2], levels
            level_gram_kernel[(triton.cdiv(rows, M // wide),)](
                panel, codes, out, *sizes, TERMS=len(panel), WIDE=wide, M=M, N=N, J=J, **LAUNCH
            )
    return out + out.transpose(1, 2)

"""The Triton kernels of products with a packed weight: y = x W^T, W dequantized on chip. triton/packed.py says which of
the three runs, and launches it.

A *packet* is what one lane unpacks: the 32/b codes of a word at b = 8, 4 and 2 bits; at 3 bits the 8 codes of three
bytes, cut from the one or two words in which they lie.

* ``gemv_kernel``, one row of x: bound by memory where the SM keeps up. A lane holds one packet at a time and the x of
  its columns in registers, used for R rows, so every load of codes is 128 consecutive bytes of a warp, and nothing goes
  through shared memory before the last sum.
* ``gemm_kernel``, up to 64 rows of x: weights dequantized into tl.dot tiles, the weight as the left operand (its many
  rows fill the tile's 16 or 64 rows, x its narrow side). Few rows of W are split over columns too; the partial sums are
  added in a fixed order, so the result never varies.
* ``dequantize_kernel``: a range of rows of W, dense, for torch's product.

The level lut[row, code] is loaded through a pointer. The tables of a program's rows are one or two cache lines that
stay in L1, and a lane's loads are independent. Counted in the machine code of the gemv loop (sm_90, Triton 3.9): 6.9
instructions a 4-bit code, 9.5 for affine with groups of 128. tl.gather on a register tile became select chains (175 a
code, with spills); a tree of 15 selects costs twice the load; Triton has no shuffle. An SM issues 128 lane instructions
a cycle: 19 codes. An A100 needs 20-26 to keep up with its memory, an L40S 5, an H200 41.

Sums are float32. Affine weights are round((code - Z) S) to the stored dtype, as every reader of the file computes them,
from a float f = 1 + code/K whose bits are set directly: f K S - (K + Z) S where S has 16 bits, (f - (1 + Z/K)) K S
else; both round no more than the definition.

Arguments of all: the weight as words (packed codes i32 [rows, width]), lut [rows, K] or scale and zero
[rows, groups]; compile-time constants BITS, P (codes of a packet), GROUP (columns of a group), KIND (LUT or AFFINE),
STORED (dtype that W is rounded to), DTYPE (dtype of the product's operands), R, T, M (rows of W, packets, rows of x of
a tile)."""

from typing import no_type_check

import torch
import triton
import triton.language as tl

LUT, AFFINE = tl.constexpr(0), tl.constexpr(1)
PACKET = {2: 16, 3: 8, 4: 8, 8: 4}  # bits -> codes of a packet
FLOATS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
@no_type_check
def packet(stream, t, live, width, BITS: tl.constexpr):
    """Packets t of the rows that ``stream`` points to, as uint32: code i has bits [i b, (i+1) b)."""
    if BITS == 3:
        word, shift = (t * 24) >> 5, (t * 24) & 31
        low = tl.load(stream + word, mask=live & (word < width), other=0, eviction_policy="evict_first").to(
            tl.uint32, bitcast=True
        )
        high = tl.load(stream + word + 1, mask=live & (word + 1 < width) & (shift > 8), other=0).to(
            tl.uint32, bitcast=True
        )
        shift = shift.to(tl.uint32)
        out = (low >> shift) | ((high << (31 - shift)) << 1)  # twice, since a shift by 32 is undefined
    else:
        out = tl.load(stream + t, mask=live & (t < width), other=0, eviction_policy="evict_first").to(
            tl.uint32, bitcast=True
        )
    return out


@triton.jit
@no_type_check
def group_scale(scale, zero, base, t, live, cols, groups, K: tl.constexpr, P: tl.constexpr, GROUP: tl.constexpr):
    """K S of the packets' groups, and their origin: (K + Z) S where S has 16 bits, so that the product is exact; else
    1 + Z/K."""
    spot = base * groups + t * P // GROUP
    mask = live & (t * P < cols)
    step = tl.load(scale + spot, mask=mask, other=0.0).to(tl.float32) * K
    origin = tl.load(zero + spot, mask=mask, other=0).to(tl.float32) * (1.0 / K) + 1.0
    if scale.dtype.element_ty != tl.float32:
        origin = origin * step
    return step, origin


@triton.jit
@no_type_check
def level(i: tl.constexpr, packed, table, step, origin, scale, zero, base, t, live, cols, groups, BITS: tl.constexpr,
          P: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr, STORED: tl.constexpr):  # fmt: skip
    """The weight of code i of every packet, in the dtype of the table or of the stored weight."""
    K: tl.constexpr = 2**BITS
    if KIND == LUT:
        SIZE: tl.constexpr = table.dtype.element_ty.primitive_bitwidth // 16  # log2 of the bytes of a level
        if BITS > 4:
            value = tl.load(table + ((packed >> (BITS * i)) & (K - 1)).to(tl.int32))
        else:  # tables are aligned to their size (see Packed.aligned), so the address is an OR, not two long additions
            if BITS * i >= SIZE:
                offset = (packed >> (BITS * i - SIZE)) & ((K - 1) << SIZE)
            else:
                offset = (packed << (SIZE - BITS * i)) & ((K - 1) << SIZE)
            value = tl.load((table.to(tl.int64) | offset.to(tl.int64)).to(table.dtype))
    else:
        if GROUP % P != 0:  # groups that cut packets
            step, origin = group_scale(scale, zero, base, t * P + i, live, cols, groups, K, 1, GROUP)
        if BITS * i + BITS > 23:
            top = packed >> (BITS * i + BITS - 23)
        else:
            top = packed << (23 - BITS * i - BITS)
        one_point_code = ((top & ((K - 1) << (23 - BITS))) | 0x3F800000).to(tl.float32, bitcast=True)
        if scale.dtype.element_ty != tl.float32:
            exact = one_point_code * step - origin  # three short numbers: exact, fused or not
        else:
            exact = (one_point_code - origin) * step
        value = exact.to(STORED)
    return value


@triton.jit
@no_type_check
def four(v):
    """The columns of v [T, 4], each [T]; costs nothing where a lane holds all four."""
    even, odd = tl.split(tl.reshape(v, [v.shape[0], 2, 2]))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
@no_type_check
def eight(v):
    """The columns of v [T, 8], each [T]."""
    even, odd = tl.split(tl.reshape(v, [v.shape[0], 4, 2]))
    x0, x2, x4, x6 = four(even)
    x1, x3, x5, x7 = four(odd)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
@no_type_check
def inputs(x, first, cols, N: tl.constexpr):
    """x[first + 0..N-1] as float32 [T, N]."""
    column = first[:, None] + tl.arange(0, N)[None, :]
    return tl.load(x + column, mask=column < cols, other=0.0).to(tl.float32)


# words and width are not specialized, so that a lane loads one packet at a time, in the layout in which it also holds
# the packet's columns of x.
@triton.jit(do_not_specialize=["words", "width"])
@no_type_check
def gemv_kernel(x, words, lut, scale, zero, y, rows, cols, width, groups, BITS: tl.constexpr, P: tl.constexpr,
                GROUP: tl.constexpr, KIND: tl.constexpr, STORED: tl.constexpr, R: tl.constexpr,
                T: tl.constexpr):  # fmt: skip
    """y [rows] = W x for one x [cols], R rows a program."""
    K: tl.constexpr = 2**BITS
    row = tl.program_id(0) * R + tl.arange(0, R)
    live = (row < rows)[:, None]
    base = tl.minimum(row, rows - 1).to(tl.int64)[:, None]
    stream, table = words + base * width, lut + base * K
    acc = tl.zeros([R, T], tl.float32)
    for start in range(0, tl.cdiv(cols, P), T):
        t = start + tl.arange(0, T)
        packed = packet(stream, t[None, :], live, width, BITS)
        if P == 4:
            xs = four(inputs(x, t * P, cols, 4))
        elif P == 8:
            xs = eight(inputs(x, t * P, cols, 8))
        else:
            xs = eight(inputs(x, t * P, cols, 8)) + eight(inputs(x, t * P + 8, cols, 8))
        if KIND == AFFINE and GROUP % P == 0:
            step, origin = group_scale(scale, zero, base, t[None, :], live, cols, groups, K, P, GROUP)
        else:
            step, origin = 0.0, 0.0
        for i in tl.static_range(P):
            w = level(i, packed, table, step, origin, scale, zero, base, t[None, :], live, cols, groups, BITS, P,
                      GROUP, KIND, STORED)  # fmt: skip
            acc += w.to(tl.float32) * xs[i][None, :]
    tl.store(y + row, tl.sum(acc, 1).to(y.dtype.element_ty), mask=row < rows)


@triton.jit
@no_type_check
def merge(even, odd):
    """Two [R, T, N] as one [R, T, 2 N], their elements alternating."""
    both = tl.join(even, odd)
    return tl.reshape(both, [both.shape[0], both.shape[1], both.shape[2] * 2])


@triton.jit
@no_type_check
def weights(stream, lut, scale, zero, base, t, live, cols, width, groups, BITS: tl.constexpr, P: tl.constexpr,
            GROUP: tl.constexpr, KIND: tl.constexpr, STORED: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """The weights of packets t [1, T], as DTYPE [R, T P]."""
    K: tl.constexpr = 2**BITS
    packed = packet(stream, t, live, width, BITS)
    table = lut + base * K
    if KIND == AFFINE and GROUP % P == 0:
        step, origin = group_scale(scale, zero, base, t, live, cols, groups, K, P, GROUP)
    else:
        step, origin = 0.0, 0.0
    args = (packed, table, step, origin, scale, zero, base, t, live, cols, groups)
    if P == 4:
        out = merge(two(0, 2, args, BITS, P, GROUP, KIND, STORED), two(1, 2, args, BITS, P, GROUP, KIND, STORED))
    elif P == 8:
        out = octet(0, 1, args, BITS, P, GROUP, KIND, STORED)
    else:
        out = merge(octet(0, 2, args, BITS, P, GROUP, KIND, STORED), octet(1, 2, args, BITS, P, GROUP, KIND, STORED))
    return tl.reshape(out, [out.shape[0], out.shape[1] * P]).to(DTYPE)


@triton.jit
@no_type_check
def two(FIRST: tl.constexpr, STEP: tl.constexpr, args, BITS: tl.constexpr, P: tl.constexpr, GROUP: tl.constexpr,
        KIND: tl.constexpr, STORED: tl.constexpr):  # fmt: skip
    """Codes FIRST and FIRST + STEP of every packet: [R, T, 2]."""
    packed, table, step, origin, scale, zero, base, t, live, cols, groups = args
    a = level(FIRST, packed, table, step, origin, scale, zero, base, t, live, cols, groups, BITS, P, GROUP, KIND,
              STORED)  # fmt: skip
    b = level(FIRST + STEP, packed, table, step, origin, scale, zero, base, t, live, cols, groups, BITS, P, GROUP, KIND,
              STORED)  # fmt: skip
    return tl.join(a, b)


@triton.jit
@no_type_check
def octet(FIRST: tl.constexpr, STEP: tl.constexpr, args, BITS: tl.constexpr, P: tl.constexpr, GROUP: tl.constexpr,
          KIND: tl.constexpr, STORED: tl.constexpr):  # fmt: skip
    """Codes FIRST, FIRST + STEP, ... of every packet: [R, T, 8]."""
    even = merge(two(FIRST, 4 * STEP, args, BITS, P, GROUP, KIND, STORED),
                 two(FIRST + 2 * STEP, 4 * STEP, args, BITS, P, GROUP, KIND, STORED))  # fmt: skip
    odd = merge(two(FIRST + STEP, 4 * STEP, args, BITS, P, GROUP, KIND, STORED),
                two(FIRST + 3 * STEP, 4 * STEP, args, BITS, P, GROUP, KIND, STORED))  # fmt: skip
    return merge(even, odd)


@triton.jit
@no_type_check
def gemm_kernel(x, words, lut, scale, zero, y, m, rows, cols, width, groups, span, BITS: tl.constexpr, P: tl.constexpr,
                GROUP: tl.constexpr, KIND: tl.constexpr, STORED: tl.constexpr, DTYPE: tl.constexpr, R: tl.constexpr,
                T: tl.constexpr, M: tl.constexpr):  # fmt: skip
    """y [splits, m, rows] = x W^T for x [m, cols], each split the sum over its ``span`` packets of columns."""
    row, item = tl.program_id(0) * R + tl.arange(0, R), tl.arange(0, M)
    live = (row < rows)[:, None]
    base = tl.minimum(row, rows - 1).to(tl.int64)[:, None]
    stream = words + base * width
    acc = tl.zeros([R, M], tl.float32)
    begin = tl.program_id(1) * span
    for start in range(begin, tl.minimum(begin + span, tl.cdiv(cols, P)), T):
        t = (start + tl.arange(0, T))[None, :]
        w = weights(stream, lut, scale, zero, base, t, live, cols, width, groups, BITS, P, GROUP, KIND, STORED, DTYPE)
        column = (start * P + tl.arange(0, T * P))[:, None]
        xt = tl.load(
            x + item.to(tl.int64)[None, :] * cols + column, mask=(item < m)[None, :] & (column < cols), other=0.0
        )
        acc = tl.dot(w, xt.to(DTYPE), acc, input_precision="ieee")
    spot = (tl.program_id(1) * m + item).to(tl.int64)[None, :] * rows + row[:, None]
    tl.store(y + spot, acc.to(y.dtype.element_ty), mask=(item < m)[None, :] & live)


@triton.jit
@no_type_check
def dequantize_kernel(words, lut, scale, zero, out, rows, cols, width, groups, BITS: tl.constexpr, P: tl.constexpr,
                      GROUP: tl.constexpr, KIND: tl.constexpr, STORED: tl.constexpr, DTYPE: tl.constexpr,
                      R: tl.constexpr, T: tl.constexpr):  # fmt: skip
    """out [rows, cols] = W, in DTYPE."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    live = (row < rows)[:, None]
    base = tl.minimum(row, rows - 1).to(tl.int64)[:, None]
    t = (tl.program_id(1) * T + tl.arange(0, T))[None, :]
    w = weights(
        words + base * width, lut, scale, zero, base, t, live, cols, width, groups, BITS, P, GROUP, KIND, STORED, DTYPE
    )
    column = (tl.program_id(1) * T * P + tl.arange(0, T * P))[None, :]
    tl.store(out + base * cols + column, w, mask=live & (column < cols))

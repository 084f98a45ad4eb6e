"""Products with a weight that stays packed, on a GPU: what lut_linear and affine_linear share.

A *packet* is what one lane unpacks: the 32/b codes of a word at 8, 4 and 2 bits; at 3 bits the 8 codes of three bytes,
cut from the one or two words they lie in. Three kernels, by the number m of rows of x:

* m = 1, ``gemv_kernel``: bound by memory where the SM keeps up. A lane holds one packet a step and the x of its columns
  in registers, used for R rows, so every load of codes is 128 consecutive bytes a warp and nothing goes through shared
  memory before the last sum.
* m <= 64, ``gemm_kernel``: weights dequantized into tl.dot tiles, the weight as the left operand (its many rows fill
  the tile's 16 or 64 rows, x its narrow side); few rows are split over columns too, partial sums added in a fixed
  order, so the result never varies.
* more: ``dequantize_kernel`` a tile of rows at a time, then torch's product.

Looking up lut[row, code]: by pointer. The tables of a program's rows are one or two cache lines that stay in L1, and a
lane's loads are independent. Counted in the machine code of the gemv loop (sm_90, Triton 3.9): 6.9 instructions a 4-bit
code, 9.5 for affine g128. tl.gather on a register tile became select chains (175 a code, with spills); a tree of 15
selects costs twice the load; Triton has no shuffle. An SM issues 128 lane instructions a cycle: 19 codes. An A100 needs
20-26 to keep up with its memory, an L40S 5, an H200 41. Sums are float32. Affine weights are round((code - Z) S) to the
stored dtype, as every reader of the file computes them, from a float f = 1 + code/K built by bits: f K S - (K + Z) S
where S has 16 bits, (f - (1 + Z/K)) K S else; both round no more than the definition."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from leangrid.errors import ShapeError

LUT, AFFINE = tl.constexpr(0), tl.constexpr(1)
PACKET = {2: 16, 3: 8, 4: 8, 8: 4}  # codes a packet
FLOATS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
GEMM_LIMIT = 64  # rows of x beyond which a dense copy of the weight pays
TILE = 1 << 26  # weights dequantized at once
WHOLE = 1 << 30  # columns a group, where a group is a row: more than any row has


@triton.jit
@no_type_check
def packet(stream, t, live, width, BITS: tl.constexpr):
    """Packets t of the rows that ``stream`` points to, as uint32: code i in bits [i b, (i+1) b)."""
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
    """K S of the packets' groups, and what stands for their Z: (K + Z) S where S has 16 bits, so that it is exact; else
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
def level(i: tl.constexpr, packed, table, step, origin, scale, zero, base, t, live, cols, groups, BITS: tl.constexpr, P: tl.constexpr,
          GROUP: tl.constexpr, KIND: tl.constexpr, STORED: tl.constexpr):  # fmt: skip
    """The weight of code i of every packet, in the dtype of the table or of the stored weight."""
    K: tl.constexpr = 2**BITS
    if KIND == LUT:
        SIZE: tl.constexpr = table.dtype.element_ty.primitive_bitwidth // 16  # log2 of the bytes of a level
        if BITS > 4:
            value = tl.load(table + ((packed >> (BITS * i)) & (K - 1)).to(tl.int32))
        else:  # tables are aligned to their size (see Packed.aligned): the address is an OR, not two long additions
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
    """The columns of [T, 4], each [T]; free where a lane holds all four."""
    even, odd = tl.split(tl.reshape(v, [v.shape[0], 2, 2]))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
@no_type_check
def eight(v):
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


# Unspecialized, so that a lane loads one packet at a time: the layout in which it also holds the packet's columns of x.
@triton.jit(do_not_specialize=["words", "width"])
@no_type_check
def gemv_kernel(x, words, lut, scale, zero, y, rows, cols, width, groups, BITS: tl.constexpr, P: tl.constexpr, GROUP: tl.constexpr,
                KIND: tl.constexpr, STORED: tl.constexpr, R: tl.constexpr, T: tl.constexpr):  # fmt: skip
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
            w = level(
                i,
                packed,
                table,
                step,
                origin,
                scale,
                zero,
                base,
                t[None, :],
                live,
                cols,
                groups,
                BITS,
                P,
                GROUP,
                KIND,
                STORED,
            )
            acc += w.to(tl.float32) * xs[i][None, :]
    tl.store(y + row, tl.sum(acc, 1).to(y.dtype.element_ty), mask=row < rows)


@triton.jit
@no_type_check
def merge(even, odd):
    """[R, T, N] twice -> [R, T, 2 N], alternating."""
    both = tl.join(even, odd)
    return tl.reshape(both, [both.shape[0], both.shape[1], both.shape[2] * 2])


@triton.jit
@no_type_check
def weights(stream, lut, scale, zero, base, t, live, cols, width, groups, BITS: tl.constexpr, P: tl.constexpr, GROUP: tl.constexpr,
            KIND: tl.constexpr, STORED: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
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
def two(FIRST: tl.constexpr, STEP: tl.constexpr, args, BITS: tl.constexpr, P: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr,
        STORED: tl.constexpr):  # fmt: skip
    packed, table, step, origin, scale, zero, base, t, live, cols, groups = args
    a = level(
        FIRST, packed, table, step, origin, scale, zero, base, t, live, cols, groups, BITS, P, GROUP, KIND, STORED
    )
    b = level(
        FIRST + STEP,
        packed,
        table,
        step,
        origin,
        scale,
        zero,
        base,
        t,
        live,
        cols,
        groups,
        BITS,
        P,
        GROUP,
        KIND,
        STORED,
    )
    return tl.join(a, b)


@triton.jit
@no_type_check
def octet(FIRST: tl.constexpr, STEP: tl.constexpr, args, BITS: tl.constexpr, P: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr,
          STORED: tl.constexpr):  # fmt: skip
    """Codes FIRST, FIRST + STEP, ... of every packet: [R, T, 8]."""
    even = merge(two(FIRST, 4 * STEP, args, BITS, P, GROUP, KIND, STORED),
                 two(FIRST + 2 * STEP, 4 * STEP, args, BITS, P, GROUP, KIND, STORED))  # fmt: skip
    odd = merge(two(FIRST + STEP, 4 * STEP, args, BITS, P, GROUP, KIND, STORED),
                two(FIRST + 3 * STEP, 4 * STEP, args, BITS, P, GROUP, KIND, STORED))  # fmt: skip
    return merge(even, odd)


@triton.jit
@no_type_check
def gemm_kernel(x, words, lut, scale, zero, y, m, rows, cols, width, groups, span, BITS: tl.constexpr, P: tl.constexpr,
                GROUP: tl.constexpr, KIND: tl.constexpr, STORED: tl.constexpr, DTYPE: tl.constexpr, R: tl.constexpr, T: tl.constexpr,
                M: tl.constexpr):  # fmt: skip
    """y[split, m, rows] of the split's ``span`` packets."""
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
def dequantize_kernel(words, lut, scale, zero, out, rows, cols, width, groups, BITS: tl.constexpr, P: tl.constexpr, GROUP: tl.constexpr,
                      KIND: tl.constexpr, STORED: tl.constexpr, DTYPE: tl.constexpr, R: tl.constexpr, T: tl.constexpr):  # fmt: skip
    row = tl.program_id(0) * R + tl.arange(0, R)
    live = (row < rows)[:, None]
    base = tl.minimum(row, rows - 1).to(tl.int64)[:, None]
    t = (tl.program_id(1) * T + tl.arange(0, T))[None, :]
    w = weights(
        words + base * width, lut, scale, zero, base, t, live, cols, width, groups, BITS, P, GROUP, KIND, STORED, DTYPE
    )
    column = (tl.program_id(1) * T * P + tl.arange(0, T * P))[None, :]
    tl.store(out + base * cols + column, w, mask=live & (column < cols))


@dataclass(frozen=True, eq=False)
class Packed:
    """A packed weight [rows, cols], contiguous: the stream, and lut [rows, K] or scale and zero_point [rows, groups];
    what a kind lacks may be any tensor of as many rows."""

    words: Tensor
    lut: Tensor
    scale: Tensor
    zero: Tensor
    cols: int
    bits: int
    stored: torch.dtype
    affine: bool
    group: int = WHOLE

    def aligned(self) -> "Packed":
        """Tables that start at a multiple of their size, as every fresh allocation does."""
        table = self.lut.shape[1] * self.lut.element_size()
        if self.affine or self.bits > 4 or self.lut.data_ptr() % table == 0:
            return self
        return replace(self, lut=self.lut.clone())

    @property
    def fixed(self) -> dict[str, Any]:
        """What the kernels know at compile time, and how they are launched."""
        group = WHOLE if self.group == self.cols else self.group
        return {
            "BITS": self.bits,
            "P": PACKET[self.bits],
            "GROUP": group,
            "KIND": int(self.affine),
            "STORED": FLOATS[self.stored],
            "num_warps": 4,
            "num_stages": 3,
            "enable_fp_fusion": True,
        }

    @property
    def grid(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.words, self.lut, self.scale, self.zero

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return len(self.words), self.cols, self.words.shape[1], self.scale.shape[1]

    def part(self, start: int, stop: int) -> "Packed":
        """Some rows of it."""
        cut = slice(start, stop)
        return replace(self, words=self.words[cut], lut=self.lut[cut], scale=self.scale[cut], zero=self.zero[cut])


def product(x: Tensor, weight: Packed, splits: int | None = None) -> Tensor:
    """x [m, cols] times the weight's transpose: [m, rows], of x's dtype."""
    m, rows = len(x), len(weight.words)
    if m == 0 or rows == 0 or weight.cols == 0:
        return x.new_zeros(m, rows)
    x, weight = x.contiguous(), weight.aligned()
    with torch.cuda.device_of(x):
        if m == 1:
            return _gemv(x, weight)
        return _gemm(x, weight, splits) if m <= GEMM_LIMIT else _dense(x, weight)


def _gemv(x: Tensor, weight: Packed) -> Tensor:
    """Rows a program: few enough that four programs or more meet on every SM at the sizes of language models, where one
    pass over the columns is long enough to leave splitting it to the batched kernel."""
    rows, packets = len(weight.words), triton.cdiv(weight.cols, PACKET[weight.bits])
    y = x.new_empty(1, rows)
    tile = 8 if rows >= 8192 else 4 if rows >= 2048 else 2
    step = min(512, 4096 // PACKET[weight.bits], triton.next_power_of_2(packets))
    gemv_kernel[(triton.cdiv(rows, tile),)](x, *weight.grid, y, *weight.sizes, **weight.fixed, R=tile, T=step)
    return y


def _gemm(x: Tensor, weight: Packed, splits: int | None) -> Tensor:
    rows, m, lanes = len(weight.words), len(x), PACKET[weight.bits]
    wide = max(16, triton.next_power_of_2(m))
    dtype = weight.stored if weight.stored == x.dtype else torch.float32
    if (
        interpreted()
    ):  # the interpreter multiplies bfloat16 operands as if their bits were integers; float32 holds them exactly
        dtype = torch.float32
    tile, step = (32, 256 // lanes) if wide == 16 else (64, 128 // lanes)
    if dtype == torch.float32:  # no tensor cores: smaller tiles, or the operands fill the registers
        step = 32 // lanes
    packets = triton.cdiv(weight.cols, lanes)
    steps = triton.cdiv(packets, step)
    if splits is None:
        splits = 4 * _processors(x.device) // triton.cdiv(rows, tile)
    span = triton.cdiv(steps, min(max(1, splits), steps)) * step
    splits = triton.cdiv(packets, span)
    y = torch.empty(splits, m, rows, dtype=x.dtype if splits == 1 else torch.float32, device=x.device)
    gemm_kernel[(triton.cdiv(rows, tile), splits)](
        x, *weight.grid, y, m, *weight.sizes, span, **weight.fixed, DTYPE=FLOATS[dtype], R=tile, T=step, M=wide
    )
    return y[0] if splits == 1 else y.sum(0).to(x.dtype)


def _dense(x: Tensor, weight: Packed) -> Tensor:
    dtype = weight.stored if weight.stored == x.dtype else torch.float32
    y = x.new_empty(len(x), len(weight.words))
    for start, stop, dense in dequantized(weight, dtype):
        y[:, start:stop] = x.to(dtype) @ dense.T
    return y


def dequantized(weight: Packed, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
    """(start, stop, W[start:stop]) in tiles of rows of at most TILE weights."""
    rows, cols, lanes = len(weight.words), weight.cols, PACKET[weight.bits]
    tile = max(1, TILE // cols)
    for start in range(0, rows, tile):
        stop = min(start + tile, rows)
        part = weight.part(start, stop)
        out = torch.empty(stop - start, cols, dtype=dtype, device=weight.words.device)
        grid = triton.cdiv(stop - start, 16), triton.cdiv(cols, 256)
        dequantize_kernel[grid](*part.grid, out, *part.sizes, **part.fixed, DTYPE=FLOATS[dtype], R=16, T=256 // lanes)
        yield start, stop, out


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python here (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def check(op: str, x: Tensor, words: Tensor, bits: int, **grid: Tensor) -> None:
    """ShapeError, before anything is launched, for what no kernel can take; ``grid`` tensors have one row a row of
    words."""
    if bits not in PACKET:
        raise ShapeError(
            f"{op}: no kernel for {bits} bits", op, f"Use {', '.join(map(str, PACKET))} bits, or the layer's torch path"
        )
    if x.ndim != 2 or x.dtype not in FLOATS:
        raise ShapeError(f"{op}: x is {x.dtype} {tuple(x.shape)}", op, "Give a matrix of float32, float16 or bfloat16")
    width = -(-x.shape[1] * bits // 32)
    if words.ndim != 2 or words.dtype != torch.int32 or words.shape[1] != width:
        raise ShapeError(f"{op}: words are {words.dtype} {tuple(words.shape)}", op,
                         f"{x.shape[1]} codes of {bits} bits are {width} int32 words a row")  # fmt: skip
    for name, tensor in grid.items():
        if tensor.ndim != 2 or len(tensor) != len(words):
            raise ShapeError(f"{op}: {name} is {tuple(tensor.shape)} for {len(words)} rows", op)
    if any(tensor.device != x.device for tensor in (words, *grid.values())):
        raise ShapeError(f"{op}: x is on {x.device}, the weight on {words.device}", op, "Move them to one device")
    if x.device.type != "cuda" and not interpreted():
        raise ShapeError(
            f"{op}: x is on {x.device}", op, "The Triton kernels need a CUDA device (or TRITON_INTERPRET=1)"
        )

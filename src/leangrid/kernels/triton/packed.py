"""Products with a weight that stays packed, on a GPU: what lut_linear and affine_linear share.

By the number m of rows of x: m = 1 runs ``gemv_kernel``; up to GEMM_LIMIT rows ``gemm_kernel``; more dequantize some
rows of W at a time and use torch's product (the kernels are in packed_kernels.py)."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from leangrid.errors import ShapeError
from leangrid.kernels.triton.packed_kernels import FLOATS, PACKET, dequantize_kernel, gemm_kernel, gemv_kernel

GEMM_LIMIT = 64  # rows of x beyond which a dense copy of W costs less
DENSE_CHUNK = 1 << 26  # weights dequantized at once
WHOLE = 1 << 30  # the group size of a group that is a whole row: more columns than any row has


@dataclass(frozen=True, eq=False)
class Packed:
    """A packed weight [rows, cols]; all its tensors are contiguous.

    Attributes:
        words: packed codes, i32 [rows, ceil(cols * bits / 32)].
        lut: levels [rows, 2^bits] where ``affine`` is False, else any tensor of as many rows.
        scale, zero: [rows, groups] where ``affine`` is True, zero points u8; else any tensors of as many rows.
        stored: the dtype that W is rounded to.
        group: columns of a group.
    """

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
        """The same weight with a LUT that starts at a multiple of a row's bytes, as every new allocation does."""
        table = self.lut.shape[1] * self.lut.element_size()
        if self.affine or self.bits > 4 or self.lut.data_ptr() % table == 0:
            return self
        return replace(self, lut=self.lut.clone())

    @property
    def constants(self) -> dict[str, Any]:
        """Compile-time arguments of the kernels, and Triton's launch options."""
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
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The kernels' arguments words, lut, scale and zero."""
        return self.words, self.lut, self.scale, self.zero

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """The kernels' arguments rows, cols, width and groups."""
        return len(self.words), self.cols, self.words.shape[1], self.scale.shape[1]

    def rows(self, start: int, stop: int) -> "Packed":
        """Its rows start..stop."""
        cut = slice(start, stop)
        return replace(self, words=self.words[cut], lut=self.lut[cut], scale=self.scale[cut], zero=self.zero[cut])


def product(x: Tensor, weight: Packed, splits: int | None = None) -> Tensor:
    """x W^T for x [m, cols]: [m, rows] of x's dtype. ``splits``: into how many sums over columns ``gemm_kernel``
    divides the work; None chooses by the number of processors."""
    m, rows = len(x), len(weight.words)
    if m == 0 or rows == 0 or weight.cols == 0:
        return x.new_zeros(m, rows)
    x, weight = x.contiguous(), weight.aligned()
    with torch.cuda.device_of(x):
        if m == 1:
            return _gemv(x, weight)
        return _gemm(x, weight, splits) if m <= GEMM_LIMIT else _dense(x, weight)


def _gemv(x: Tensor, weight: Packed) -> Tensor:
    """One row of x. A program has so few rows of W that every SM runs four programs or more at the sizes of language
    models; columns are not split."""
    rows, packets = len(weight.words), triton.cdiv(weight.cols, PACKET[weight.bits])
    y = x.new_empty(1, rows)
    tile = 8 if rows >= 8192 else 4 if rows >= 2048 else 2
    step = min(512, 4096 // PACKET[weight.bits], triton.next_power_of_2(packets))
    gemv_kernel[(triton.cdiv(rows, tile),)](x, *weight.tensors, y, *weight.sizes, **weight.constants, R=tile, T=step)
    return y


def _gemm(x: Tensor, weight: Packed, splits: int | None) -> Tensor:
    """2 to GEMM_LIMIT rows of x."""
    rows, m, lanes = len(weight.words), len(x), PACKET[weight.bits]
    wide = max(16, triton.next_power_of_2(m))
    dtype = weight.stored if weight.stored == x.dtype else torch.float32
    if interpreted():  # it multiplies bfloat16 operands as if their bits were integers; float32 holds them exactly
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
        x, *weight.tensors, y, m, *weight.sizes, span, **weight.constants, DTYPE=FLOATS[dtype], R=tile, T=step, M=wide
    )
    return y[0] if splits == 1 else y.sum(0).to(x.dtype)


def _dense(x: Tensor, weight: Packed) -> Tensor:
    """More rows of x: torch's product with dense rows of W."""
    dtype = weight.stored if weight.stored == x.dtype else torch.float32
    y = x.new_empty(len(x), len(weight.words))
    for start, stop, dense in dequantized(weight, dtype):
        y[:, start:stop] = x.to(dtype) @ dense.T
    return y


def dequantized(weight: Packed, dtype: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (start, stop, W[start:stop] in ``dtype``), at most DENSE_CHUNK weights or one row at a time."""
    rows, cols, lanes = len(weight.words), weight.cols, PACKET[weight.bits]
    tile = max(1, DENSE_CHUNK // cols)
    for start in range(0, rows, tile):
        stop = min(start + tile, rows)
        part = weight.rows(start, stop)
        out = torch.empty(stop - start, cols, dtype=dtype, device=weight.words.device)
        grid = triton.cdiv(stop - start, 16), triton.cdiv(cols, 256)
        dequantize_kernel[grid](
            *part.tensors, out, *part.sizes, **part.constants, DTYPE=FLOATS[dtype], R=16, T=256 // lanes
        )
        yield start, stop, out


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python here (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def check_arguments(op: str, x: Tensor, words: Tensor, bits: int, **grid: Tensor) -> None:
    """Raise ShapeError for what no kernel accepts, before one is launched: bits, dtypes, shapes, devices. ``grid``: the
    tensors of the grid by name, each of as many rows as ``words``."""
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

"""The values of weights that are stored in fewer bits than 16: codes times scales, as the software that writes each
layout computes them.

FP8 with blocks of scales is DeepSeek-V3's (transformers: integrations/finegrained_fp8.py), MXFP4 gpt-oss's (the same
folder: mxfp4.py; OCP Microscaling Formats 1.0, E2M1 and E8M0), packed integers and NVFP4 are compressed-tensors', and
NVFP4 with a second scale that multiplies is ModelOpt's."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from leangrid.errors import CheckpointError
from leangrid.storage.dtypes import DTYPES
from leangrid.storage.safetensors import TensorInfo

Kind = Literal["float", "int", "packed", "fp4"]
EXPONENTS = ("U8", "F8_E8M0")  # dtypes of scales that are powers of two, stored as the exponent plus 127
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # the values of FP4 without sign
_CHUNK = 1 << 20  # values that are decoded at once, so that float32 copies stay small beside the tensor itself


@dataclass(frozen=True)
class Layout:
    """How a matrix [rows, cols] is stored in codes and scales.

    Attributes:
        kind: ``float``: FP8; ``int``: an integer a byte; ``packed``: integers of ``bits`` bits in int32 words, the
            first in the lowest bits, plus 2^(bits - 1); ``fp4``: E2M1, two a byte, the first in the lower half.
        bits: bits of a code.
        block: (rows, cols) of the values that share a scale; the last blocks may be smaller.
        exponents: whether the scales are powers of two, stored as their exponent plus 127 (E8M0).
        through: the dtype to which products are rounded before they are converted to the tensor's own.
        transposed: the tensor is the transposed of what the codes hold.
        holes: whether a word of packed integers holds whole ones only, so that its highest bits may be unused.
    """

    kind: Kind
    bits: int
    block: tuple[int, int]
    exponents: bool = False
    through: torch.dtype = torch.float32
    transposed: bool = False
    holes: bool = False


@dataclass(frozen=True)
class DequantizedInfo(TensorInfo):
    """A tensor that is no range of bytes: it is dequantized when it is read.

    ``dtype`` and ``shape`` are those of the dequantized tensor, ``file`` is where its codes are, ``start`` and ``end``
    say its size only.

    Attributes:
        layout: how its last two dimensions are stored; a dimension before them counts such matrices.
        parts: where its ``codes`` and ``scale`` are, and where it has them ``zero_point``, ``scale_2`` (multiplies the
            scales), ``global_scale`` (divides them), ``groups`` (which group of scales each column has) and ``shape``
            (rows and cols).
        names: the names of the parts in the files.
        kept: the first and last (exclusive) row that are wanted of it; None: all.
    """

    layout: Layout
    parts: Mapping[str, TensorInfo] = field(hash=False)
    names: Mapping[str, str] = field(hash=False)
    kept: tuple[int, int] | None = None

    @property
    def is_plain(self) -> bool:
        """False: its bytes in the file are codes."""
        return False

    def entry(self, index: int) -> "DequantizedInfo":
        """Matrix ``index`` of a tensor of three dimensions."""
        count, shape = self.shape[0], self.shape[1:]
        parts = {r: p.entry(index) if p.shape and p.shape[0] == count else p for r, p in self.parts.items()}
        return replace(self, shape=shape, parts=parts, start=0, end=self.nbytes // count)

    def rows(self, start: int, stop: int) -> "DequantizedInfo":
        """The rows ``start`` to ``stop`` (exclusive) of a matrix that is not transposed."""
        size = self.nbytes // self.shape[0]
        return replace(self, shape=(stop - start, self.shape[1]), kept=(start, stop), end=(stop - start) * size)


def dequantize(info: DequantizedInfo, read: Callable[[str], Tensor]) -> Tensor:
    """Read and dequantize a tensor.

    Args:
        read: gives a part by its name in ``info.parts``, in the dtype and shape that it is stored in.

    Returns:
        The tensor in ``info.shape`` and ``info.dtype``. Beside it and its parts a few megabytes are needed.

    Raises:
        CheckpointError: the shape that is stored beside packed integers is not that of their scales, or a column's
            group is none of them.
    """
    layout, dtype = info.layout, DTYPES[info.dtype]
    shape = info.shape if info.kept is None else (info.parts["codes"].shape[0], info.shape[1])
    rows, cols = reversed(shape[-2:]) if layout.transposed else shape[-2:]
    count = math.prod(shape[:-2])
    if "shape" in info.parts and (said := read("shape").tolist()) != [rows, cols]:
        what = f"'{info.names['shape']}' says that '{info.names['codes']}' is {said}, its scales are of {[rows, cols]}"
        raise CheckpointError(what, info.file, "Download the checkpoint again")
    codes = read("codes").reshape(count, rows, -1)
    scale = as_scale(read("scale"), layout)
    if "scale_2" in info.parts:
        scale = scale.reshape(count, -1) * read("scale_2").float().reshape(-1, 1)
    if "global_scale" in info.parts:
        scale = scale.reshape(count, -1) / read("global_scale").float().reshape(-1, 1)
    scale = scale.reshape(count, -(-rows // layout.block[0]), -1)
    zero = _zero_point(read("zero_point"), layout, rows).reshape(scale.shape) if "zero_point" in info.parts else None
    groups = _groups(info, read("groups"), scale.shape[-1]) if "groups" in info.parts else None
    found = torch.empty((count, rows, cols), dtype=dtype)
    for index in range(count):
        _matrix(found[index], codes[index], scale[index], None if zero is None else zero[index], groups, layout)
    if layout.transposed:
        found = found.transpose(1, 2).contiguous()
    found = found.reshape(shape)
    return found if info.kept is None else found[info.kept[0] : info.kept[1]].contiguous()


def as_scale(stored: Tensor, layout: Layout) -> Tensor:
    """Stored scales as float32 in their shape; NaN for the exponent 255."""
    if not layout.exponents:
        return stored.float()
    exponent = stored.contiguous().view(torch.uint8)
    return torch.where(exponent == 255, torch.nan, torch.exp2(exponent.float() - 127))


def packed_words(count: int, bits: int, holes: bool = False) -> int:
    """The int32 words that hold ``count`` packed integers of ``bits`` bits; with ``holes`` none is in two words."""
    return -(-count // (32 // bits)) if holes else -(-count * bits // 32)


def _groups(info: DequantizedInfo, stored: Tensor, count: int) -> Tensor | None:
    """The group of each column, int64; None where -1 says that they follow one another (compressed-tensors' g_idx)."""
    if bool((stored == -1).any()):
        return None
    if not 0 <= int(stored.min()) <= int(stored.max()) < count:
        what = f"'{info.names['groups']}' names groups from {int(stored.min())} to {int(stored.max())} of {count}"
        raise CheckpointError(what, info.file, "Download the checkpoint again")
    return stored.long()


def _matrix(
    out: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, groups: Tensor | None, layout: Layout
) -> None:
    """Fill ``out`` [rows, cols] from codes [rows, width] and float32 scales and zero points, one for each block."""
    rows, cols = out.shape
    high, wide = layout.block
    step = max(1, _CHUNK // cols)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        which = torch.arange(start, stop) // high

        def spread(per_block: Tensor, which: Tensor = which) -> Tensor:
            chosen = per_block[which]
            if groups is not None:
                return chosen[:, groups]
            return chosen if chosen.shape[1] == 1 else chosen.repeat_interleave(wide, dim=1)[:, :cols]

        values = _values(codes[start:stop], layout, cols)
        if zero is not None:
            values -= spread(zero)
        out[start:stop] = (values * spread(scale)).to(layout.through)


def _values(codes: Tensor, layout: Layout, cols: int) -> Tensor:
    """The float32 values [rows, cols] of codes before they are scaled."""
    if layout.kind == "fp4":
        signed = torch.tensor([*_E2M1, *(-value for value in _E2M1)])
        return _pairs(signed, codes.contiguous().view(torch.uint8))[:, :cols]
    if layout.kind == "packed":
        return _unpack(codes, layout.bits, cols, layout.holes)
    return codes.float()


def _pairs(table: Tensor, codes: Tensor) -> Tensor:
    """Two values of a ``table`` of 16 for each byte, the lower half first: [rows, 2 x width]."""
    byte = torch.arange(256)
    both = torch.stack((table[byte & 15], table[byte >> 4]), dim=1)
    return both[codes.int()].flatten(1)


def _unpack(words: Tensor, bits: int, count: int, holes: bool) -> Tensor:
    """The first ``count`` integers of each row of int32 words [rows, words], as float32, 2^(bits - 1) subtracted."""
    offset = 1 << (bits - 1)
    if bits == 4:
        return _pairs(torch.arange(16.0) - offset, words.contiguous().view(torch.uint8))[:, :count]
    if bits == 8:
        return words.contiguous().view(torch.uint8)[:, :count].float() - offset
    number = torch.arange(count)
    at = number // (32 // bits) * 32 + number % (32 // bits) * bits if holes else number * bits
    wide = torch.nn.functional.pad(words.long() & 0xFFFFFFFF, (0, 1))  # a code may end in the next word
    both = wide[:, at // 32] | wide[:, at // 32 + 1] << 32
    return ((both >> at % 32) & ((1 << bits) - 1)).float() - offset


def _zero_point(stored: Tensor, layout: Layout, rows: int) -> Tensor:
    """Zero points as float32, one for each scale; those of packed integers are packed along the rows."""
    if stored.dtype == torch.int32 and layout.kind == "packed":
        return _unpack(stored.T, layout.bits, rows, layout.holes).T
    return stored.float()

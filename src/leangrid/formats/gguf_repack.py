"""A finished affine layer as llama.cpp's blocks: the same weight S (q - Z), exactly, or refused.

Types without a minimum hold d (q - 2^(bits-1)). The difference q - Z of two codes is a signed number of one bit more,
so it fits a type of one bit more whatever Z is. Q5_K, Q4_K and Q2_K hold (d sc) q - (dmin m), which is S q - S Z with
d = dmin = S, sc = 1, m = Z."""

from dataclasses import dataclass

import torch
from jaxtyping import UInt8
from torch import Tensor

from leangrid.block_types import BLOCK_TYPES, BlockType
from leangrid.errors import FormatError
from leangrid.formats.gguf_blocks import Parts, pack
from leangrid.grids import AffineGrid
from leangrid.schemes import Scheme

_SMALLEST = 32  # columns in the smallest block


@dataclass(frozen=True)
class _Choice:
    """The type ``block_type`` holds codes of ``bits`` bits exactly, if the columns of one scale are a multiple of
    ``columns``."""

    bits: int
    block_type: str
    columns: int
    symmetric_only: bool = False


# Smallest first: the first that fits is used.
_CHOICES = (
    _Choice(2, "Q2_K", 256),
    _Choice(2, "Q4_0", 32),
    _Choice(3, "Q3_K", 256, symmetric_only=True),
    _Choice(3, "Q4_0", 32),
    _Choice(4, "Q4_0", 32, symmetric_only=True),
    _Choice(4, "Q4_K", 256),
    _Choice(4, "Q5_0", 32),
    _Choice(5, "Q5_0", 32, symmetric_only=True),
    _Choice(5, "Q5_K", 256),
    _Choice(5, "Q8_0", 32),
    _Choice(6, "Q6_K", 256, symmetric_only=True),
    _Choice(6, "Q8_0", 32),
    _Choice(8, "Q8_0", 32, symmetric_only=True),
)


def refuse(scheme: Scheme, name: str, rows: int, cols: int, kind: str = "linear") -> str | None:
    """Why no block type holds this layer exactly, and the way out; None if one does."""
    if scheme.grid != "affine":
        held = "a non-uniform grid" if scheme.grid == "nonuniform" else "scales and offsets as this result stores them"
        way_out = "Quantize with W4A16_G32_SYM (Q4_0), W4A16_G64 (Q5_0) or W4A16"
        return f"{name}: no block type of llama.cpp holds {held}. {way_out}"
    if kind == "conv1d":
        return f"{name} is a Conv1D, which the GGUF export does not write. Use format lut (NU4), or dense"
    columns = scheme.group_size or cols
    if cols % _SMALLEST or columns % _SMALLEST:
        what = f"{name}: llama.cpp's blocks hold {_SMALLEST} columns, which do not divide {columns}"
        return f"{what}. Use groups of 32, 64 or 128, or dense"
    if _fitting(scheme, cols) is None:
        return f"{name}: llama.cpp has no type for {scheme.bits} bits with a zero point. Use W{scheme.bits}A16_G64_SYM"
    return None


def choose_block_type(scheme: Scheme, cols: int) -> BlockType:
    """The smallest type that holds a row of ``cols`` exactly; FormatError where ``refuse`` says so."""
    block_type = _fitting(scheme, cols)
    if block_type is None:
        raise FormatError(refuse(scheme, "the layer", 1, cols) or "no block type fits")
    return block_type


def _fitting(scheme: Scheme, cols: int) -> BlockType | None:
    columns = scheme.group_size or cols
    for choice in _CHOICES if scheme.grid == "affine" else ():
        if (
            choice.bits == scheme.bits
            and columns % choice.columns == 0
            and (scheme.symmetric or not choice.symmetric_only)
        ):
            return BLOCK_TYPES[choice.block_type]
    return None


def check_scale(scale: Tensor, name: str) -> None:
    """FormatError where float16, in which every block type stores its scale, would round one of ``scale``."""
    changed = int((scale.to(torch.float16).float() != scale.float()).sum())
    if changed:
        what = f"{changed} of {scale.numel()} scales are not exact in float16, in which llama.cpp's blocks hold them"
        raise FormatError(what, name, "Quantize a checkpoint stored in float16 or bfloat16, or export to dense")


def pack_affine(
    block_type: BlockType, codes: UInt8[Tensor, "rows cols"], grid: AffineGrid
) -> UInt8[Tensor, "rows bytes"]:
    """The bytes of the blocks that hold S (q - Z).

    Raises:
        FormatError: a scale is not exact in float16, or a code does not fit the type.
    """
    cols = codes.shape[1]
    columns = grid.group_size or cols
    d = grid.scale.repeat_interleave(columns // block_type.cols, dim=1)  # the blocks of a group share its scale
    groups = (codes.shape[0], cols // block_type.group)
    one = torch.ones(groups, dtype=torch.int16, device=codes.device) if block_type.sc else None
    if block_type.minimum:
        zero = grid.zero_point.to(torch.int16).repeat_interleave(columns // block_type.group, dim=1)
        return pack(block_type, Parts(codes, d, d, one, zero))
    zero = grid.zero_point.to(torch.int16).repeat_interleave(columns, dim=1)
    moved = codes.to(torch.int16) - zero + block_type.middle
    if not 0 <= int(moved.min()) <= int(moved.max()) < 2**block_type.bits:
        raise FormatError(
            f"{block_type.name} cannot hold these codes and zero points",
            None,
            "Quantize with the scheme's _SYM variant",
        )
    return pack(block_type, Parts(moved.to(torch.uint8), d, None, one, None))

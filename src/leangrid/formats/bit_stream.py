"""Codes to dense bit streams and back: the layout of compressed-tensors ``pack-quantized``, for 1 to 8 bits.

Along the last dimension, code i of a row occupies bits [i b, (i+1) b) of the row's stream, least significant bit first.
The stream is stored in 32-bit words, little end first, without padding between codes: 32 codes are exactly b words.
"""

from jaxtyping import Int32, UInt8
from torch import Tensor

from leangrid.errors import ShapeError
from leangrid.kernels import packed

_WORD = 32


def packed_width(cols: int, bits: int) -> int:
    """The number of 32-bit words of a row of ``cols`` codes: ceil(cols * bits / 32)."""
    return -(-cols * bits // _WORD)


def pack(codes: UInt8[Tensor, "rows cols"], bits: int) -> Int32[Tensor, "rows words"]:
    """The codes as int32 words [rows, ceil(cols * bits / 32)]; unused high bits of a row's last word are 0.

    Raises:
        ShapeError: ``bits`` is not in 1..8, or a code does not fit.
    """
    _check_bits(bits)
    if codes.numel() and int(codes.max()) >= 2**bits:
        raise ShapeError(f"a code of {int(codes.max())} does not fit in {bits} bits", "pack")
    return packed.pack(codes, bits)


def unpack(words: Int32[Tensor, "rows words"], bits: int, cols: int) -> UInt8[Tensor, "rows cols"]:
    """The ``cols`` codes of each row.

    Raises:
        ShapeError: ``bits`` is not in 1..8, or there are not ceil(cols * bits / 32) words a row.
    """
    _check_bits(bits)
    if words.ndim != 2 or words.shape[1] != packed_width(cols, bits):
        raise ShapeError(
            f"{cols} codes of {bits} bits need {packed_width(cols, bits)} words a row, not {tuple(words.shape)}",
            "unpack",
        )
    return packed.unpack(words, bits, cols)


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ShapeError(f"{bits} bits cannot be packed", "packing", "Use 1 to 8 bits")

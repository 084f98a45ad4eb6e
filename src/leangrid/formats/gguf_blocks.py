"""Codes and scales <-> the bytes of a GGUF tensor, for each of llama.cpp's block types.

block_types.py says what a block of each type means; this module says where its fields lie.

Source: ggml-common.h (the structs) and ggml-quants.c (``dequantize_row_*``) of llama.cpp; gguf-py's quants.py is the
same in numpy."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from leangrid.block_types import BlockType
from leangrid.errors import FormatError, ShapeError

_WAY_OUT = "Round the grid to what the block type holds before solving"


@dataclass(frozen=True, eq=False)
class Parts:
    """The fields of a matrix's blocks, by ggml's names.

    Attributes:
        codes: uint8 [rows, cols].
        d: scales of the blocks, float32 [rows, blocks], exact in float16.
        dmin: scales of the minima, as ``d``; None for types without a minimum.
        sc: integer scales of the groups of a block, int16 [rows, cols / group]; None for types without them.
        m: integer minima of the groups, as ``sc``.
    """

    codes: UInt8[Tensor, "rows cols"]
    d: Float[Tensor, "rows blocks"]
    dmin: Float[Tensor, "rows blocks"] | None = None
    sc: Int[Tensor, "rows groups"] | None = None
    m: Int[Tensor, "rows groups"] | None = None


def pack(block_type: BlockType, parts: Parts) -> UInt8[Tensor, "rows bytes"]:
    """The bytes of each row, uint8.

    Raises:
        ShapeError: the tensors' shapes do not fit each other or the type.
        FormatError: a code or an integer does not fit its field, or float16 rounds a ``d`` or ``dmin``.
    """
    rows, cols = parts.codes.shape
    width, blocks = block_type.row_bytes(cols), cols // block_type.cols
    _check_parts(block_type, parts, (rows, blocks), (rows, cols // block_type.group))
    fields = {"codes": parts.codes.reshape(rows, blocks, block_type.cols), "d": _half(parts.d, "d")}
    if parts.dmin is not None:
        fields["dmin"] = _half(parts.dmin, "dmin")
    for name, value in (("sc", parts.sc), ("m", parts.m)):
        if value is not None:
            fields[name] = value.to(torch.int16).reshape(rows, blocks, -1)
    return torch.cat(_LAYOUTS[block_type.name].pack(fields), dim=2).reshape(rows, width)


def unpack(block_type: BlockType, stored: UInt8[Tensor, "rows bytes"]) -> Parts:
    """The inverse of ``pack``; ShapeError where the bytes are no whole blocks."""
    rows, width = stored.shape
    if stored.dtype != torch.uint8 or width % block_type.nbytes:
        raise ShapeError(
            f"{width} {stored.dtype} a row are no whole {block_type.name} blocks of {block_type.nbytes} bytes"
        )
    layout = _LAYOUTS[block_type.name]
    pieces = stored.reshape(rows, -1, block_type.nbytes).split(layout.sizes, dim=2)
    fields = layout.unpack(*pieces)
    flat = {name: value.reshape(rows, -1) for name, value in fields.items()}
    return Parts(**flat)


def dequantize(block_type: BlockType, parts: Parts) -> Float[Tensor, "rows cols"]:
    """The weight, float32, in the order of operations of llama.cpp's reader: its products are exact, so that only the
    last operation rounds."""
    rows, cols = parts.codes.shape

    def wide(values: Tensor, size: int) -> Tensor:
        return values.float().reshape(rows, -1, 1).expand(-1, -1, size).reshape(rows, cols)

    scale = (
        wide(parts.d, block_type.cols)
        if parts.sc is None
        else wide(parts.d, block_type.cols) * wide(parts.sc, block_type.group)
    )
    weight = scale * (parts.codes.float() - block_type.middle)
    if parts.dmin is None:
        return weight
    return (
        weight + wide(parts.dmin, block_type.cols)
        if parts.m is None
        else weight - wide(parts.dmin, block_type.cols) * wide(parts.m, block_type.group)
    )


def _check_parts(block_type: BlockType, parts: Parts, blocks: tuple[int, int], groups: tuple[int, int]) -> None:
    wanted = {
        "d": blocks,
        "dmin": blocks if block_type.minimum else None,
        "sc": groups if block_type.sc else None,
        "m": groups if block_type.m else None,
    }
    for name, shape in wanted.items():
        value = getattr(parts, name)
        found = None if value is None else tuple(value.shape)
        if found != shape:
            raise ShapeError(
                f"{block_type.name} of {tuple(parts.codes.shape)} needs {name} of shape {shape}, not {found}"
            )
    for name, value, limits in (
        ("code", parts.codes, (0, 2**block_type.bits - 1)),
        ("sc", parts.sc, block_type.sc),
        ("m", parts.m, block_type.m),
    ):
        if (
            value is not None
            and limits is not None
            and value.numel()
            and not limits[0] <= int(value.min()) <= int(value.max()) <= limits[1]
        ):
            found = f"{int(value.min())}..{int(value.max())}"
            what = f"{block_type.name} holds {name} of {limits[0]}..{limits[1]}, not {found}"
            raise FormatError(what, None, _WAY_OUT)


def _half(values: Float[Tensor, "rows blocks"], name: str) -> UInt8[Tensor, "rows blocks 2"]:
    """The little-endian bytes of float16 numbers; FormatError where float16 changes a value."""
    stored = values.to(torch.float16).contiguous()
    if not torch.equal(stored.float(), values.float()) or not bool(stored.isfinite().all()):
        raise FormatError(f"{name} is not exact in float16, as llama.cpp's blocks store it", None, _WAY_OUT)
    return stored.view(torch.uint8).reshape(*values.shape, 2)


def _float(stored: UInt8[Tensor, "rows blocks 2"]) -> Float[Tensor, "rows blocks"]:
    return stored.contiguous().view(torch.float16).squeeze(2).float()


def _interleave(codes: Tensor, bits: int, run: int) -> Tensor:
    """Codes of ``bits`` bits in bytes: of every 8/bits runs of ``run`` codes, code i of run k goes to byte i, from bit
    k*bits on."""
    rows, blocks, _ = codes.shape
    runs = codes.reshape(rows, blocks, -1, 8 // bits, run)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)[:, None]
    return (runs << shifts).sum(dim=3, dtype=torch.uint8).reshape(rows, blocks, -1)


def _deinterleave(stored: Tensor, bits: int, run: int) -> Tensor:
    """The inverse of ``_interleave``."""
    rows, blocks, _ = stored.shape
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=stored.device)[:, None]
    return ((stored.reshape(rows, blocks, -1, 1, run) >> shifts) & (2**bits - 1)).reshape(rows, blocks, -1)


def _high_bits(codes: Tensor) -> Tensor:
    """Bit 4 of each of 32 codes in four bytes, code i in bit i (Q5_0, Q5_1)."""
    rows, blocks, _ = codes.shape
    shifts = torch.arange(8, dtype=torch.uint8, device=codes.device)
    return ((codes >> 4).reshape(rows, blocks, 4, 8) << shifts).sum(dim=3, dtype=torch.uint8)


def _from_high_bits(stored: Tensor) -> Tensor:
    """The inverse of ``_high_bits``, as numbers 0 and 1."""
    rows, blocks, _ = stored.shape
    shifts = torch.arange(8, dtype=torch.uint8, device=stored.device)
    return ((stored[..., None] >> shifts) & 1).reshape(rows, blocks, 32)


def _six_bits(sc: Tensor, m: Tensor) -> Tensor:
    """Eight scales and eight minima of 6 bits in 12 bytes (Q4_K, Q5_K).

    Bytes 0..3 and 4..7 hold the first four of each, and in their upper two bits the upper bits of the last four, whose
    lower four bits share bytes 8..11."""
    sc, m = sc.to(torch.uint8), m.to(torch.uint8)
    low, high = (sc[..., :4], m[..., :4]), (sc[..., 4:], m[..., 4:])
    first = [a | (b >> 4 << 6) for a, b in zip(low, high, strict=True)]
    return torch.cat((*first, (high[0] & 15) | ((high[1] & 15) << 4)), dim=2)


def _from_six_bits(stored: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of ``_six_bits``."""
    a, b, rest = stored[..., :4], stored[..., 4:8], stored[..., 8:]
    sc = torch.cat((a & 63, (rest & 15) | (a >> 6 << 4)), dim=2)
    m = torch.cat((b & 63, (rest >> 4) | (b >> 6 << 4)), dim=2)
    return sc.to(torch.int16), m.to(torch.int16)


def _q3_scales(sc: Tensor) -> Tensor:
    """Sixteen scales of 6 bits, 32 added, in 12 bytes (Q3_K): low nibbles i and i + 8 in byte i, then the high pairs,
    four a byte."""
    value = (sc + 32).to(torch.uint8)
    return torch.cat((_interleave(value & 15, 4, 8), _interleave(value >> 4, 2, 4)), dim=2)


def _from_q3_scales(stored: Tensor) -> Tensor:
    """The inverse of ``_q3_scales``."""
    value = _deinterleave(stored[..., :8], 4, 8) | (_deinterleave(stored[..., 8:], 2, 4) << 4)
    return value.to(torch.int16) - 32


@dataclass(frozen=True)
class _Layout:
    """The fields of a block in the order of the file: their sizes in bytes, and the functions from ``Parts`` to them
    and back."""

    sizes: list[int]
    pack: Callable[[dict[str, Tensor]], list[Tensor]]
    unpack: Callable[..., dict[str, Tensor]]


_LAYOUTS: dict[str, _Layout] = {
    "Q4_0": _Layout(
        [2, 16],
        lambda f: [f["d"], _interleave(f["codes"], 4, 16)],
        lambda d, qs: {"d": _float(d), "codes": _deinterleave(qs, 4, 16)},
    ),
    "Q4_1": _Layout(
        [2, 2, 16],
        lambda f: [f["d"], f["dmin"], _interleave(f["codes"], 4, 16)],
        lambda d, dmin, qs: {"d": _float(d), "dmin": _float(dmin), "codes": _deinterleave(qs, 4, 16)},
    ),
    "Q5_0": _Layout(
        [2, 4, 16],
        lambda f: [f["d"], _high_bits(f["codes"]), _interleave(f["codes"] & 15, 4, 16)],
        lambda d, qh, qs: {"d": _float(d), "codes": _deinterleave(qs, 4, 16) | (_from_high_bits(qh) << 4)},
    ),
    "Q5_1": _Layout(
        [2, 2, 4, 16],
        lambda f: [f["d"], f["dmin"], _high_bits(f["codes"]), _interleave(f["codes"] & 15, 4, 16)],
        lambda d, dmin, qh, qs: {
            "d": _float(d),
            "dmin": _float(dmin),
            "codes": _deinterleave(qs, 4, 16) | (_from_high_bits(qh) << 4),
        },
    ),
    "Q8_0": _Layout(
        [2, 32],
        lambda f: [f["d"], f["codes"] ^ 128],  # q - 128 as a signed byte
        lambda d, qs: {"d": _float(d), "codes": qs ^ 128},
    ),
    "Q2_K": _Layout(
        [16, 64, 2, 2],
        lambda f: [
            f["sc"].to(torch.uint8) | (f["m"].to(torch.uint8) << 4),
            _interleave(f["codes"], 2, 32),
            f["d"],
            f["dmin"],
        ],
        lambda scales, qs, d, dmin: {
            "d": _float(d),
            "dmin": _float(dmin),
            "codes": _deinterleave(qs, 2, 32),
            "sc": (scales & 15).to(torch.int16),
            "m": (scales >> 4).to(torch.int16),
        },
    ),
    "Q3_K": _Layout(
        [32, 64, 12, 2],
        lambda f: [
            _interleave(f["codes"] >> 2, 1, 32),
            _interleave(f["codes"] & 3, 2, 32),
            _q3_scales(f["sc"]),
            f["d"],
        ],
        lambda mask, qs, scales, d: {
            "d": _float(d),
            "codes": _deinterleave(qs, 2, 32) | (_deinterleave(mask, 1, 32) << 2),
            "sc": _from_q3_scales(scales),
        },
    ),
    "Q4_K": _Layout(
        [2, 2, 12, 128],
        lambda f: [f["d"], f["dmin"], _six_bits(f["sc"], f["m"]), _interleave(f["codes"], 4, 32)],
        lambda d, dmin, scales, qs: {
            "d": _float(d),
            "dmin": _float(dmin),
            "codes": _deinterleave(qs, 4, 32),
            **dict(zip(("sc", "m"), _from_six_bits(scales), strict=True)),
        },
    ),
    "Q5_K": _Layout(
        [2, 2, 12, 32, 128],
        lambda f: [
            f["d"],
            f["dmin"],
            _six_bits(f["sc"], f["m"]),
            _interleave(f["codes"] >> 4, 1, 32),
            _interleave(f["codes"] & 15, 4, 32),
        ],
        lambda d, dmin, scales, qh, qs: {
            "d": _float(d),
            "dmin": _float(dmin),
            "codes": _deinterleave(qs, 4, 32) | (_deinterleave(qh, 1, 32) << 4),
            **dict(zip(("sc", "m"), _from_six_bits(scales), strict=True)),
        },
    ),
    "Q6_K": _Layout(
        [128, 64, 16, 2],
        lambda f: [
            _interleave(f["codes"] & 15, 4, 64),
            _interleave(f["codes"] >> 4, 2, 32),
            f["sc"].to(torch.int8).view(torch.uint8),
            f["d"],
        ],
        lambda ql, qh, scales, d: {
            "d": _float(d),
            "codes": _deinterleave(ql, 4, 64) | (_deinterleave(qh, 2, 32) << 4),
            "sc": scales.contiguous().view(torch.int8).to(torch.int16),
        },
    ),
}

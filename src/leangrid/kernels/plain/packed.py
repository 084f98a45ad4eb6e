"""Packed weights in plain torch: how codes are packed and tiled, and which weights they stand for. The twin of
kernels/packed.py's C++ (cpu/codes.h, cpu/product.h), and what runs where the extension or Triton is missing."""

import torch
from torch import Tensor

_UNIT = 32  # codes of b bits that fill exactly b words of 32 bits
_WORD = 0xFFFFFFFF
TILE_ROWS, LANES = 4, 16  # rows of a tile; columns of a step of 16 lanes


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes u8 [rows, cols], below 2^bits, as one bit stream a row: i32 [rows, ceil(cols * bits / 32)].

    Code i of a row has bits [i * bits, (i + 1) * bits) of the stream, lowest bit first; the rest of the last word is
    0."""
    rows, cols = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -cols % _UNIT)).reshape(rows, -1, _UNIT)
    words = torch.zeros(rows, padded.shape[1], bits, dtype=torch.int64, device=codes.device)
    for lane in range(_UNIT):
        word, shift = divmod(lane * bits, _UNIT)
        code = padded[:, :, lane].long()
        words[:, :, word] |= (code << shift) & _WORD
        if shift + bits > _UNIT:
            words[:, :, word + 1] |= code >> (_UNIT - shift)
    signed = (words ^ 0x80000000) - 0x80000000  # the same 32 bits as a two's complement number
    return signed.to(torch.int32).reshape(rows, -1)[:, : -(-cols * bits // _UNIT)].contiguous()


def unpack(words: Tensor, bits: int, cols: int) -> Tensor:
    """The codes u8 [rows, cols] that ``pack`` packed into i32 [rows, ceil(cols * bits / 32)]."""
    rows = words.shape[0]
    padded = torch.nn.functional.pad(words, (0, -words.shape[1] % bits)).reshape(rows, -1, bits)
    codes = torch.empty(rows, padded.shape[1], _UNIT, dtype=torch.uint8, device=words.device)
    for lane in range(_UNIT):
        word, shift = divmod(lane * bits, _UNIT)
        code = (padded[:, :, word].long() & _WORD) >> shift
        if shift + bits > _UNIT:
            code |= (padded[:, :, word + 1].long() & _WORD) << (_UNIT - shift)
        codes[:, :, lane] = (code & (2**bits - 1)).to(torch.uint8)
    return codes.reshape(rows, -1)[:, :cols].contiguous()


def tile_bytes(cols: int, bits: int) -> int:
    """Bytes of one tile: four rows of ``cols`` codes, laid out as cpu/codes.h says."""
    steps, per = -(-cols // LANES), 32 // bits
    return TILE_ROWS * (steps // per * 64 + LANES * -(-(steps % per) * bits // 8))


def tile(codes: Tensor, bits: int) -> Tensor:
    """Codes u8 [rows, cols] in the layout that the C++ products read (cpu/codes.h): u8 [ceil(rows / 4), tile_bytes]."""
    rows, cols = codes.shape
    steps, per = -(-cols // LANES), 32 // bits
    padded = (
        torch.nn.functional.pad(codes, (0, -cols % LANES, 0, -rows % TILE_ROWS))
        .long()
        .view(-1, TILE_ROWS, steps, LANES)
    )
    pieces = []
    for first in range(0, steps, per):
        piece = padded[:, :, first : first + per]
        shifts = torch.arange(piece.shape[2], device=codes.device)[:, None] * bits
        lanes = (piece << shifts).sum(2)  # [tiles, 4, 16]: one integer a lane
        planes = [_bytes(lanes, first_byte, count) for first_byte, count in _planes(piece.shape[2] * bits)]
        pieces.append(torch.cat(planes, -1).flatten(1))
    return torch.cat(pieces, 1)


def untile(tiles: Tensor, bits: int, rows: int, cols: int) -> Tensor:
    """The codes u8 [rows, cols] that ``tile`` laid out."""
    steps, per = -(-cols // LANES), 32 // bits
    found, at = [], 0
    for first in range(0, steps, per):
        count = min(per, steps - first)
        planes = _planes(count * bits)
        width = LANES * sum(size for _, size in planes)
        piece = tiles[:, at : at + TILE_ROWS * width].reshape(-1, TILE_ROWS, width).long()
        at += TILE_ROWS * width
        lanes = torch.zeros(*piece.shape[:2], LANES, dtype=torch.int64, device=tiles.device)
        for start, size in planes:
            plane, piece = piece[..., : LANES * size].unflatten(-1, (LANES, size)), piece[..., LANES * size :]
            for index in range(size):
                lanes |= plane[..., index] << (8 * (start + index))
        found += [(lanes >> (bits * step)) & (2**bits - 1) for step in range(count)]
    return torch.cat(found, -1).flatten(0, 1)[:rows, :cols].to(torch.uint8).contiguous()


def _planes(bits: int) -> list[tuple[int, int]]:
    """(first byte, bytes) of the planes in which a lane of so many bits is stored: 4 bytes, or 2 and 1."""
    return {1: [(0, 1)], 2: [(0, 2)], 3: [(0, 2), (2, 1)], 4: [(0, 4)]}[-(-bits // 8)]


def _bytes(lanes: Tensor, first: int, count: int) -> Tensor:
    return torch.stack([(lanes >> (8 * (first + i))) & 255 for i in range(count)], -1).to(torch.uint8).flatten(-2)


def lut_weight(codes: Tensor, lut: Tensor) -> Tensor:
    """W[i, j] = lut[i, codes[i, j]], [rows, cols] in the LUT's dtype, for codes u8 [rows, cols]."""
    return lut.gather(1, codes.long())


def offset_weight(codes: Tensor, scale: Tensor, offset: Tensor, group_size: int) -> Tensor:
    """W[i, j] = S[i, g] codes[i, j] + B[i, g], g = j // group_size: computed in float32, rounded to the scale's
    dtype."""
    rows, cols = codes.shape
    steps = codes.float().view(rows, -1, group_size)
    return (steps * scale.float()[:, :, None] + offset.float()[:, :, None]).view(rows, cols).to(scale.dtype)


def affine_weight(
    codes: Tensor, scale: Tensor, zero_point: Tensor, group_size: int, stored_dtype: torch.dtype
) -> Tensor:
    """W[i, j] = S[i, g] (codes[i, j] - Z[i, g]), g = j // group_size: computed in the scale's dtype, rounded to
    ``stored_dtype``, returned in the scale's dtype."""
    rows, cols = codes.shape
    steps = codes.to(scale.dtype).view(rows, -1, group_size)  # integers up to 255 are exact in every float dtype used
    weight = ((steps - zero_point.to(scale.dtype)[:, :, None]) * scale[:, :, None]).view(rows, cols)
    return weight if weight.dtype == stored_dtype else weight.to(stored_dtype).to(weight.dtype)

"""Block bytes against the gguf package's reference dequantizer, and against a packer that follows the structs byte by
byte."""

import struct

import gguf
import numpy as np
import pytest
import torch

from leangrid.block_types import BLOCK_TYPES, BlockType
from leangrid.errors import FormatError, ShapeError
from leangrid.formats.gguf_blocks import Parts, dequantize, pack, unpack

ROWS, BLOCKS = 5, 3


def parts_for(kind: BlockType, seed: int = 0) -> Parts:
    """Random codes and scales that use the whole of every field, scales of both signs."""
    generator = torch.Generator().manual_seed(seed)
    cols = BLOCKS * kind.cols

    def integers(low: int, high: int, width: int) -> torch.Tensor:
        values = torch.randint(low, high + 1, (ROWS, width), generator=generator)
        values[0, 0], values[0, -1] = low, high
        return values

    def halves() -> torch.Tensor:
        values = torch.rand(ROWS, BLOCKS, generator=generator) * 4e-3 + 1e-4
        return (values * torch.where(torch.rand(ROWS, BLOCKS, generator=generator) < 0.5, -1, 1)).half().float()

    return Parts(
        integers(0, 2**kind.bits - 1, cols).to(torch.uint8),
        halves(),
        halves() if kind.minimum else None,
        integers(*kind.sc, cols // kind.group) if kind.sc else None,
        integers(*kind.m, cols // kind.group) if kind.m else None,
    )


def loop_block(kind: BlockType, q: list[int], d: float, dmin: float, sc: list[int], m: list[int]) -> bytes:
    """One block, written field by field as ggml-common.h lays it out."""
    head = struct.pack("<e", d)
    if kind.name == "Q8_0":
        return head + bytes((c - 128) % 256 for c in q)
    if kind.cols == 32:
        head += struct.pack("<e", dmin) if kind.minimum else b""
        if kind.bits == 5:
            head += struct.pack("<I", sum((c >> 4) << i for i, c in enumerate(q)))
        return head + bytes((q[i] & 15) | (q[i + 16] & 15) << 4 for i in range(16))
    if kind.name in ("Q4_K", "Q5_K"):
        scales = bytearray(12)
        for j in range(8):
            if j < 4:
                scales[j] |= sc[j]
                scales[j + 4] |= m[j]
            else:
                scales[j + 4] = (sc[j] & 15) | (m[j] & 15) << 4
                scales[j - 4] |= sc[j] >> 4 << 6
                scales[j] |= m[j] >> 4 << 6
        high = bytes(sum((q[32 * j + i] >> 4) << j for j in range(8)) for i in range(32)) if kind.bits == 5 else b""
        low = bytes((q[64 * j + i] & 15) | (q[64 * j + 32 + i] & 15) << 4 for j in range(4) for i in range(32))
        return head + struct.pack("<e", dmin) + bytes(scales) + high + low
    twos = bytes(sum((q[128 * h + 32 * k + i] & 3) << 2 * k for k in range(4)) for h in range(2) for i in range(32))
    if kind.name == "Q2_K":
        return bytes(s | n << 4 for s, n in zip(sc, m, strict=True)) + twos + head + struct.pack("<e", dmin)
    if kind.name == "Q3_K":
        mask = bytes(sum((q[32 * j + i] >> 2) << j for j in range(8)) for i in range(32))
        scales = bytearray(12)
        for j, s in enumerate(sc):
            scales[j % 8] |= ((s + 32) & 15) << (4 * (j // 8))
            scales[8 + j % 4] |= ((s + 32) >> 4) << (2 * (j // 4))
        return mask + twos + bytes(scales) + head
    low = bytes((q[128 * h + i] & 15) | (q[128 * h + 64 + i] & 15) << 4 for h in range(2) for i in range(64))
    high = bytes(sum((q[128 * h + 32 * k + i] >> 4) << 2 * k for k in range(4)) for h in range(2) for i in range(32))
    return low + high + bytes(s % 256 for s in sc) + head


@pytest.fixture(params=BLOCK_TYPES)
def kind(request: pytest.FixtureRequest) -> BlockType:
    return BLOCK_TYPES[request.param]


def test_sizes_are_ggmls(kind: BlockType) -> None:
    number = gguf.GGMLQuantizationType[kind.name]
    assert kind.number == number.value and gguf.GGML_QUANT_SIZES[number] == (kind.cols, kind.nbytes)


def test_bytes_are_those_of_the_structs(kind: BlockType) -> None:
    parts = parts_for(kind)
    packed, groups = pack(kind, parts), kind.cols // kind.group
    for row in range(ROWS):
        written = b""
        for block in range(BLOCKS):
            of = slice(block * groups, (block + 1) * groups)
            dmin = 0.0 if parts.dmin is None else float(parts.dmin[row, block])
            sc, m = ([] if value is None else value[row, of].tolist() for value in (parts.sc, parts.m))
            codes = parts.codes[row, block * kind.cols : (block + 1) * kind.cols].tolist()
            written += loop_block(kind, codes, float(parts.d[row, block]), dmin, sc, m)
        assert bytes(packed[row].tolist()) == written


def test_the_reference_dequantizer_gives_our_numbers(kind: BlockType) -> None:
    parts = parts_for(kind, seed=1)
    read = gguf.dequantize(pack(kind, parts).numpy(), gguf.GGMLQuantizationType[kind.name])
    assert np.array_equal(read, dequantize(kind, parts).numpy())


def test_unpack_is_the_inverse(kind: BlockType) -> None:
    parts = parts_for(kind, seed=2)
    back = unpack(kind, pack(kind, parts))
    for name in ("codes", "d", "dmin", "sc", "m"):
        before, after = getattr(parts, name), getattr(back, name)
        assert (before is None) == (after is None)
        assert before is None or torch.equal(before.double(), after.double()), name


def _changed(parts: Parts, name: str, value: float) -> Parts:
    tensor = getattr(parts, name).clone()
    tensor[1, 0] = value
    return Parts(**{**{k: getattr(parts, k) for k in ("codes", "d", "dmin", "sc", "m")}, name: tensor})


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("Q4_K", "codes", 16),
        ("Q2_K", "sc", 16),
        ("Q4_K", "m", 64),
        ("Q3_K", "sc", -33),
        ("Q6_K", "sc", 128),
        ("Q4_0", "d", 1 / 3),
        ("Q4_1", "dmin", 1e6),
        ("Q8_0", "d", float("nan")),
    ],
)
def test_what_a_field_cannot_hold_is_refused(name: str, field: str, value: float) -> None:
    kind = BLOCK_TYPES[name]
    with pytest.raises(FormatError, match=r"float16|holds"):
        pack(kind, _changed(parts_for(kind), field, value))


def test_shapes_are_checked() -> None:
    kind = BLOCK_TYPES["Q4_K"]
    parts = parts_for(kind)
    with pytest.raises(ShapeError, match="256"):
        pack(kind, Parts(parts.codes[:, :-32], parts.d, parts.dmin, parts.sc, parts.m))
    with pytest.raises(ShapeError, match="needs m"):
        pack(kind, Parts(parts.codes, parts.d, parts.dmin, parts.sc))
    with pytest.raises(ShapeError, match="144"):
        unpack(kind, torch.zeros(2, 143, dtype=torch.uint8))

"""Dense bit streams against a packer that writes one bit at a time."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from math_problems import generator

from leangrid.errors import ShapeError
from leangrid.formats.bit_stream import pack, packed_width, unpack


def loop_pack(codes: list[int], bits: int) -> list[int]:
    stream = [code >> i & 1 for code in codes for i in range(bits)]
    stream += [0] * (-len(stream) % 32)
    words = [sum(bit << i for i, bit in enumerate(stream[start : start + 32])) for start in range(0, len(stream), 32)]
    return [word - 2**32 if word >= 2**31 else word for word in words]


@pytest.mark.fault("O1")
@given(bits=st.integers(1, 8), rows=st.integers(1, 4), cols=st.integers(1, 100), seed=st.integers(0, 999))
def test_round_trip_and_loop_packer(bits: int, rows: int, cols: int, seed: int) -> None:
    codes = torch.randint(2**bits, (rows, cols), generator=generator(seed), dtype=torch.uint8)
    words = pack(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (rows, packed_width(cols, bits))
    assert words.tolist() == [loop_pack(row, bits) for row in codes.tolist()]
    assert torch.equal(unpack(words, bits, cols), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_all_ones_fill_every_bit(bits: int) -> None:
    codes = torch.full((2, 32), 2**bits - 1, dtype=torch.uint8)
    assert bool((pack(codes, bits) == -1).all())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_layout_is_that_of_compressed_tensors(bits: int) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = torch.randint(2**bits, (3, 70), generator=generator(1), dtype=torch.uint8)
    signed = (codes.int() - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(pack(codes, bits), helpers.pack_to_int32(signed, bits))


@pytest.mark.fault("N11")
def test_codes_that_do_not_fit_and_wrong_widths_are_refused() -> None:
    codes = torch.tensor([[0, 8]], dtype=torch.uint8)
    with pytest.raises(ShapeError, match="8 does not fit in 3 bits"):
        pack(codes, 3)
    with pytest.raises(ShapeError, match="9 bits"):
        pack(codes, 9)
    with pytest.raises(ShapeError, match="need 4 words"):
        unpack(pack(codes, 4), 4, 32)

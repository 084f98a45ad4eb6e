"""What we pack, read by the compressed-tensors library itself: the same bits, and weights equal to S (q - Z)
exactly."""

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig

from leangrid.formats import FORMATS, bit_stream
from leangrid.grids import AffineGrid
from leangrid.schemes import AFFINE_BITS, Scheme

pytestmark = pytest.mark.interop

BITS = AFFINE_BITS

OURS = FORMATS["compressed-tensors"]


def random_layer(scheme: Scheme, rows: int, cols: int, dtype: torch.dtype) -> tuple[torch.Tensor, AffineGrid]:
    """Any code, any zero point, scales over many magnitudes (of both signs where symmetric)."""
    generator = torch.Generator().manual_seed(scheme.bits)
    groups = cols // scheme.group_size if scheme.group_size else 1
    scale = torch.exp(torch.rand(rows, groups, generator=generator) * 6 - 8)
    zero_point = torch.randint(scheme.levels, (rows, groups), generator=generator, dtype=torch.uint8)
    if scheme.symmetric:
        zero_point.fill_(scheme.levels // 2)
        scale *= torch.randint(2, scale.shape, generator=generator) * 2 - 1
    codes = torch.randint(scheme.levels, (rows, cols), generator=generator, dtype=torch.uint8)
    return codes, AffineGrid(scale, zero_point, scheme.bits, scheme.group_size).rounded(dtype)


@pytest.mark.fault("O1")
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("cols", [1, 31, 32, 33, 100])
def test_the_same_words_as_the_library_packs(bits: int, cols: int) -> None:
    codes = torch.randint(2**bits, (5, cols), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    theirs = pack_to_int32((codes.int() - 2 ** (bits - 1)).to(torch.int8), bits)
    assert torch.equal(bit_stream.pack(codes, bits), theirs)
    assert torch.equal(bit_stream.unpack(theirs, bits, cols), codes)
    assert torch.equal(
        unpack_from_int32(bit_stream.pack(codes, bits), bits, codes.shape).int() + 2 ** (bits - 1), codes.int()
    )


@pytest.mark.fault("O2")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("bits", BITS)
def test_the_library_decompresses_to_exactly_our_weight(
    bits: int, group_size: int | None, symmetric: bool, dtype: torch.dtype
) -> None:
    scheme = Scheme(grid="affine", method="leanquant", bits=bits, group_size=group_size, symmetric=symmetric)
    rows, cols = 50, 96 if group_size else 91  # neither fills its last word
    codes, grid = random_layer(scheme, rows, cols, dtype)
    packed = OURS.pack(codes, grid, dtype, scheme)
    stored = OURS.config({"model.q": scheme}, ["lm_head"])
    group = QuantizationConfig.model_validate(stored).config_groups["group_0"]
    read = BaseCompressor.get_value_from_registry(group.format).decompress(dict(packed), group)["weight"]

    size = group_size or cols
    wide = {"S": grid.scale.repeat_interleave(size, dim=1), "Z": grid.zero_point.repeat_interleave(size, dim=1).float()}
    expected = (wide["S"].double() * (codes.double() - wide["Z"].double())).to(dtype)
    assert read.dtype == dtype and torch.equal(read, expected)
    assert torch.equal(OURS.dense(packed, scheme, (rows, cols)), expected)


@pytest.mark.parametrize("name", ["W4A16_G64", "W3A16", "W8A16_SYM"])
def test_what_the_library_compresses_we_read(name: str) -> None:
    """The other direction: its own compressor's tensors through our reader give its own decompressed weight."""
    scheme = Scheme.parse(name)
    group = QuantizationConfig.model_validate(OURS.config({"q": scheme}, [])).config_groups["group_0"]
    weight = torch.randn(40, 128, generator=torch.Generator().manual_seed(0))
    groups = 128 // scheme.group_size if scheme.group_size else 1
    scale = weight.view(40, groups, -1).abs().amax(dim=2) / 2 ** (scheme.bits - 1)
    state = {"weight": weight, "weight_scale": scale}
    if not scheme.symmetric:
        state["weight_zero_point"] = torch.randint(
            -2, 2, (40, groups), dtype=torch.int8, generator=torch.Generator().manual_seed(1)
        )
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    theirs = compressor.compress(state, group)
    layout = OURS.layout(scheme, (40, 128), torch.float32)
    assert {suffix: (t.dtype, tuple(t.shape)) for suffix, t in theirs.items()} == layout
    assert torch.equal(OURS.dense(theirs, scheme, (40, 128)), compressor.decompress(theirs, group)["weight"])

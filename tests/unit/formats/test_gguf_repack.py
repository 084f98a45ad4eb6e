"""Affine layers in llama.cpp's blocks: S (q - Z) in float32, bit for bit, as the gguf package's reference dequantizer
reads it."""

import re

import gguf
import numpy as np
import pytest
import torch

from leangrid.errors import FormatError
from leangrid.formats import gguf_repack
from leangrid.grids import AffineGrid
from leangrid.schemes import Scheme

ROWS, COLS = 6, 512


def layer(scheme: Scheme, cols: int = COLS, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, AffineGrid]:
    """Random codes, zero points over their whole range, scales exact in ``dtype``; of both signs where symmetric."""
    generator = torch.Generator().manual_seed(scheme.bits)
    groups = cols // scheme.group_size if scheme.group_size else 1
    scale = (torch.rand(ROWS, groups, generator=generator) * 5e-3 + 1e-4).to(dtype).float()
    zero = torch.randint(0, scheme.levels, (ROWS, groups), generator=generator).to(torch.uint8)
    zero[0, 0], zero[-1, -1] = 0, scheme.levels - 1
    if scheme.symmetric:
        zero.fill_(scheme.levels // 2)
        scale[::2] *= -1
    codes = torch.randint(0, scheme.levels, (ROWS, cols), generator=generator).to(torch.uint8)
    return codes, AffineGrid(scale, zero, scheme.bits, scheme.group_size)


@pytest.mark.parametrize(
    ("name", "cols", "kind"),
    [
        ("W4A16", 512, "Q4_K"),
        ("W4A16_G256", 512, "Q4_K"),
        ("W4A16_G64", 512, "Q5_0"),
        ("W4A16", 96, "Q5_0"),
        ("W4A16_G32_SYM", 96, "Q4_0"),
        ("W4A16_SYM", 512, "Q4_0"),
        ("W3A16", 512, "Q4_0"),
        ("W3A16_G64", 192, "Q4_0"),
        ("W3A16_SYM", 512, "Q3_K"),
        ("W3A16_G32_SYM", 512, "Q4_0"),
        ("W2A16", 512, "Q2_K"),
        ("W2A16_SYM", 512, "Q2_K"),
        ("W2A16_G32", 512, "Q4_0"),
        ("W5A16_G32_SYM", 96, "Q5_0"),
        ("W5A16", 512, "Q5_K"),
        ("W5A16_G64", 512, "Q8_0"),
        ("W6A16_SYM", 512, "Q6_K"),
        ("W6A16_G32", 96, "Q8_0"),
        ("W8A16_SYM", 96, "Q8_0"),
        ("GPTQ4_G128", 512, "Q5_0"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_smallest_exact_type(name: str, cols: int, kind: str, dtype: torch.dtype) -> None:
    scheme = Scheme.parse(name)
    codes, grid = layer(scheme, cols, dtype)
    assert gguf_repack.refuse(scheme, "a.b", ROWS, cols) is None
    chosen = gguf_repack.choose_block_type(scheme, cols)
    read = gguf.dequantize(gguf_repack.pack_affine(chosen, codes, grid).numpy(), gguf.GGMLQuantizationType[kind])
    assert chosen.name == kind and np.array_equal(read, grid.dequantize(codes).numpy())


@pytest.mark.parametrize(
    ("name", "cols", "kind", "words"),
    [
        ("NU4", 512, "linear", "non-uniform.*W4A16"),
        ("W8A16", 512, "linear", "8 bits with a zero point.*W8A16_G64_SYM"),
        ("W4A16", 80, "linear", "32 columns"),
        ("W4A16_G16", 512, "linear", "do not divide 16"),
        ("W4A16", 512, "conv1d", "Conv1D"),
    ],
)
def test_refusals_name_the_layer_and_what_fits(name: str, cols: int, kind: str, words: str) -> None:
    reason = gguf_repack.refuse(Scheme.parse(name), "a.b", ROWS, cols, kind)
    assert reason is not None and re.search(f"a.b.*{words}", reason)
    if kind == "linear":
        with pytest.raises(FormatError):
            gguf_repack.choose_block_type(Scheme.parse(name), cols)


def test_scales_that_float16_would_round_are_refused() -> None:
    gguf_repack.check_scale(torch.tensor([[2**-14, 0.5]], dtype=torch.bfloat16), "a.b")
    for bad in (torch.tensor([[1 / 3]]), torch.tensor([[1.7e-7]]), torch.tensor([[1e6]])):
        with pytest.raises(FormatError, match="1 of 1 scales"):
            gguf_repack.check_scale(bad, "a.b")
    scheme = Scheme.parse("W4A16")
    codes, grid = layer(scheme, dtype=torch.float32)
    with pytest.raises(FormatError, match="float16"):
        gguf_repack.pack_affine(gguf_repack.choose_block_type(scheme, COLS), codes, grid)

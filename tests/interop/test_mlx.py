"""What we pack, read by mlx itself: the same words, weights equal to s q + b exactly, and its product with them."""

from typing import Any

import numpy as np
import pytest
import torch

from leangrid.formats import FORMATS
from leangrid.formats.mlx import BITS, GROUPS
from leangrid.grids import AffineGrid, OffsetGrid
from leangrid.schemes import Scheme

mx = pytest.importorskip("mlx.core", reason="mlx has no wheel for this platform")

pytestmark = pytest.mark.interop

mlx = FORMATS["mlx"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
_MX = {torch.float32: mx.float32, torch.bfloat16: mx.bfloat16, torch.float16: mx.float16}
ROWS, COLS = 12, 256


def to_mlx(tensor: torch.Tensor) -> Any:
    """The same numbers; float32 on the way, which holds both half precisions."""
    if not tensor.dtype.is_floating_point:
        return mx.array(tensor.numpy())
    return mx.array(tensor.float().numpy()).astype(_MX[tensor.dtype])


def to_torch(array: Any) -> torch.Tensor:
    dtype = next(name for name, theirs in _MX.items() if theirs == array.dtype)
    return torch.from_numpy(np.array(array.astype(mx.float32))).to(dtype)


def random_layer(bits: int, group_size: int, dtype: torch.dtype) -> tuple[torch.Tensor, OffsetGrid, Scheme]:
    """Any code, scales of both signs over many magnitudes, offsets of their size."""
    generator = torch.Generator().manual_seed(bits + group_size)
    scale = torch.exp(torch.rand(ROWS, COLS // group_size, generator=generator) * 6 - 8)
    scale *= torch.randint(2, scale.shape, generator=generator) * 2 - 1
    offset = torch.randn(scale.shape, generator=generator) * scale * 2 ** (bits - 1)
    codes = torch.randint(2**bits, (ROWS, COLS), generator=generator, dtype=torch.uint8)
    scheme = Scheme(grid="affine", method="leanquant", bits=bits, group_size=group_size)
    return codes, OffsetGrid(scale, offset, bits, group_size).rounded(dtype), scheme


@pytest.mark.fault("O2")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("bits", BITS)
def test_mlx_dequantizes_to_exactly_our_weight(bits: int, group_size: int, dtype: torch.dtype) -> None:
    """In float32 and rounded once, as its Metal kernels do. Its CPU backend in half precision rounds s q as well: that
    is its own."""
    codes, grid, scheme = random_layer(bits, group_size, dtype)
    tensors = mlx.pack(codes, grid, dtype, scheme)
    dense = mlx.dense(tensors, scheme, (ROWS, COLS))
    words, scales, biases = (to_mlx(tensors[name]) for name in ("weight", "scales", "biases"))
    wide = mx.dequantize(words, scales.astype(mx.float32), biases.astype(mx.float32), group_size=group_size, bits=bits)
    assert torch.equal(to_torch(wide), grid.dequantize(codes))
    assert torch.equal(to_torch(wide.astype(_MX[dtype])), dense)

    twice = mx.dequantize(words, scales, biases, group_size=group_size, bits=bits)
    wide_scale = tensors["scales"].repeat_interleave(group_size, dim=1)
    assert torch.equal(
        to_torch(twice), codes.to(dtype) * wide_scale + tensors["biases"].repeat_interleave(group_size, dim=1)
    )


@pytest.mark.parametrize("bits", BITS)
def test_its_product_is_the_dense_one(bits: int) -> None:
    codes, grid, scheme = random_layer(bits, 64, torch.bfloat16)
    tensors = mlx.pack(codes, grid, torch.bfloat16, scheme)
    x = torch.randn(3, COLS, generator=torch.Generator().manual_seed(0))
    words, scales, biases = (to_mlx(tensors[name]) for name in ("weight", "scales", "biases"))
    y = mx.quantized_matmul(
        to_mlx(x), words, scales.astype(mx.float32), biases.astype(mx.float32), transpose=True, group_size=64, bits=bits
    )
    torch.testing.assert_close(to_torch(y), x @ grid.dequantize(codes).T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bits", BITS)
def test_a_symmetric_grid_is_the_same_weight_in_mlx(bits: int) -> None:
    scheme = Scheme(grid="affine", method="leanquant", bits=bits, group_size=64, symmetric=True)
    codes, offset_grid, _ = random_layer(bits, 64, torch.bfloat16)
    grid = AffineGrid(
        offset_grid.scale, torch.full_like(offset_grid.scale, 2 ** (bits - 1), dtype=torch.uint8), bits, 64
    )
    tensors = mlx.pack(codes, grid, torch.bfloat16, scheme)
    scales, biases = (to_mlx(tensors[name]).astype(mx.float32) for name in ("scales", "biases"))
    wide = mx.dequantize(to_mlx(tensors["weight"]), scales, biases, group_size=64, bits=bits)
    assert torch.equal(to_torch(wide), grid.dequantize(codes))


@pytest.mark.parametrize("bits", BITS)
def test_what_mlx_quantizes_we_read(bits: int) -> None:
    """The other direction: its own quantizer's tensors through our reader give its own weight."""
    scheme = Scheme(grid="affine", method="leanquant", bits=bits, group_size=32)
    weight = torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(1)).half()
    words, scales, biases = mx.quantize(to_mlx(weight), group_size=32, bits=bits)
    theirs = {"weight": torch.from_numpy(np.array(words)), "scales": to_torch(scales), "biases": to_torch(biases)}
    wide = mx.dequantize(words, scales.astype(mx.float32), biases.astype(mx.float32), group_size=32, bits=bits)
    assert torch.equal(mlx.dense(theirs, scheme, (ROWS, COLS)), to_torch(wide.astype(mx.float16)))

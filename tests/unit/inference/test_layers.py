"""The packed layers: the dense layer's product on the weight that the format says."""

import pytest
import torch
from quantized_checkpoints import grid_for
from torch.nn import functional

from leangrid.errors import ShapeError
from leangrid.formats import FORMATS
from leangrid.inference.layers import AffineLinear, LutLinear, PackedLinear
from leangrid.kernels import packed
from leangrid.recipe import Recipe
from leangrid.schemes import Scheme

SCHEMES = ["NU2", "NU3", "NU4", "W2A16_G16", "W3A16", "W4A16_G24", "W8A16", "W3A16_G8_SYM", "W4A16_SYM"]


def packed_layer(
    name: str, rows: int, cols: int, dtype: torch.dtype, bias: bool = True
) -> tuple[PackedLinear, torch.Tensor]:
    """A layer filled through its state dict, and the weight that its format's ``dense`` gives."""
    scheme = Scheme.parse(name)
    fmt = FORMATS[Recipe(scheme=name).resolved().format]
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows)).to(dtype)
    grid = grid_for(weight, scheme, dtype)
    tensors = fmt.pack(grid.nearest(weight.float()), grid, dtype, scheme)
    if scheme.grid == "nonuniform":
        layer = LutLinear(cols, rows, scheme.bits, bias, dtype)
    else:
        layer = AffineLinear(
            cols, rows, scheme.bits, bias, dtype, group_size=scheme.group_size, symmetric=scheme.symmetric
        )
    extra = {"bias": torch.randn(rows, dtype=dtype)} if bias else {}
    layer.load_state_dict({**tensors, **extra})
    return layer, fmt.dense(tensors, scheme, (rows, cols))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SCHEMES)
def test_weight_and_product_are_the_dense_ones_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    layer, dense = packed_layer(name, 37, 48, dtype)
    assert layer.weight_hat.dtype == dtype and torch.equal(layer.weight_hat, dense)
    x = torch.randn(2, packed.MAX_TOKENS, 48, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert torch.equal(
        layer(x), functional.linear(x, dense, layer.bias)
    )  # few tokens are summed in another order: unit/kernels/test_packed.py


@pytest.mark.fault("O6")
@pytest.mark.parametrize("batch", [(), (0,), (1,), (17,), (2, 3)])
def test_any_batch_and_strides(batch: tuple[int, ...]) -> None:
    layer, dense = packed_layer("NU3", 9, 40, torch.float32)
    x = torch.randn(*batch, 80)[..., ::2]
    torch.testing.assert_close(layer(x), functional.linear(x, dense, layer.bias))


@pytest.mark.parametrize("name", ["NU4", "W3A16_G16"])
def test_tiles_of_rows_give_the_same_product(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, dense = packed_layer(name, 37, 48, torch.float32)
    monkeypatch.setattr(packed, "DENSE_CHUNK", 48 * 5)
    x = torch.randn(packed.MAX_TOKENS + 1, 48)
    torch.testing.assert_close(layer(x), functional.linear(x, dense, layer.bias))
    torch.testing.assert_close(packed_layer(name, 37, 48, torch.float32, bias=False)[0](x), functional.linear(x, dense))


def test_nothing_is_cached_between_calls() -> None:
    layer, _ = packed_layer("NU4", 16, 64, torch.float32)
    before = sorted(layer.state_dict()), sorted(vars(layer))
    layer(torch.randn(2, 64))
    assert (sorted(layer.state_dict()), sorted(vars(layer))) == before
    layer.lut.mul_(2)
    assert torch.equal(layer.weight_hat, layer.rows(0, 16)) and float(layer.weight_hat.abs().max()) == float(
        layer.lut.abs().max()
    )


def test_wrong_sizes_are_refused() -> None:
    layer, _ = packed_layer("NU4", 16, 64, torch.float32)
    with pytest.raises(ShapeError, match=r"63.*64"):
        layer(torch.randn(2, 63))
    with pytest.raises(ShapeError, match=r"5.*48"):
        AffineLinear(48, 4, 4, False, torch.float32, group_size=5)
    with pytest.raises(ShapeError):
        LutLinear(48, 4, 9, False, torch.float32)

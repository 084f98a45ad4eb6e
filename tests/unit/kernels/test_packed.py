"""Products with packed weights: every native path against the torch twins, for shapes that do not tile and every width
of code."""

import copy

import pytest
import torch
from math_problems import generator
from torch import Tensor
from torch.nn import functional

from leangrid.errors import ShapeError
from leangrid.inference.layers import AffineLinear, LutLinear
from leangrid.kernels import native, packed
from leangrid.kernels.plain import packed as twin

SHAPES = [(1, 1), (3, 5), (4, 16), (7, 33), (9, 160), (6, 575), (5, 608)]
BITS = range(1, 9)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def codes_of(rows: int, cols: int, bits: int) -> Tensor:
    return torch.randint(2**bits, (rows, cols), generator=generator(rows * cols + bits), dtype=torch.uint8)


def lut_of(rows: int, bits: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, 2**bits, generator=generator(bits)).to(dtype)


def grid_of(rows: int, groups: int, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    scale = torch.randn(rows, groups, generator=generator(groups)).to(dtype)
    return scale, torch.randint(2**bits, (rows, groups), generator=generator(bits), dtype=torch.uint8)


def near(found: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Within what the order of a float32 sum, and one rounding to the dtype, may change."""
    wide = None if bias is None else bias.double()
    exact = functional.linear(x.double(), weight.double(), wide)
    scale = functional.linear(x.double().abs(), weight.double().abs(), None if wide is None else wide.abs())
    unit = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}[found.dtype]
    assert found.dtype == x.dtype and found.shape == exact.shape
    assert bool(((found.double() - exact).abs() <= 2e-6 * scale + unit * exact.abs() + 1e-7).all())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_layouts_are_the_twins_and_come_back(isa: str, shape: tuple[int, int], bits: int) -> None:
    codes = codes_of(*shape, bits)
    words = packed.pack(codes, bits)
    assert torch.equal(words, twin.pack(codes, bits))
    assert torch.equal(packed.unpack(words, bits, shape[1]), codes) and torch.equal(
        twin.unpack(words, bits, shape[1]), codes
    )
    tiles = packed.tile(words, bits, shape[1])
    assert torch.equal(tiles, twin.tile(codes, bits)) and torch.equal(twin.untile(tiles, bits, *shape), codes)
    assert torch.equal(packed.untile(tiles, bits, *shape), words)
    assert native.module().tile_bytes(shape[1], bits) == twin.tile_bytes(shape[1], bits) == tiles.shape[1]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_and_products_of_a_lut(isa: str, shape: tuple[int, int], bits: int) -> None:
    (rows, cols), codes = shape, codes_of(*shape, bits)
    tiles = packed.tile(packed.pack(codes, bits), bits, cols)
    for dtype in DTYPES:
        lut, bias = lut_of(rows, bits, dtype), torch.randn(rows).to(dtype)
        weight = twin.lut_weight(codes, lut)
        assert torch.equal(packed.lut_rows(tiles, lut, bits, cols)(0, rows), weight)
        assert torch.equal(packed.lut_rows(tiles, lut, bits, cols)(rows // 2, rows), weight[rows // 2 :])
        for tokens in (0, 1, 3, 16, 17, packed.MAX_TOKENS + 1):
            x = torch.randn(tokens, cols, generator=generator(tokens)).to(dtype)
            near(
                packed.lut_linear(x, tiles, lut, bias if tokens % 2 else None, bits),
                x,
                weight,
                bias if tokens % 2 else None,
            )


# dtype of the grid and the products, and the one that W is rounded to
PAIRS = [(d, d) for d in DTYPES] + [
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.float16),
]
GROUPS = [(575, None), (576, 64), (576, 16), (48, 24), (40, 8), (33, 1), (160, 32)]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("cols", "group"), GROUPS)
def test_rows_and_products_of_an_affine_grid(isa: str, cols: int, group: int | None, bits: int) -> None:
    rows, size = 6, group or cols
    codes = codes_of(rows, cols, bits)
    tiles = packed.tile(packed.pack(codes, bits), bits, cols)
    for dtype, stored in PAIRS:
        scale, zero_point = grid_of(rows, cols // size, bits, dtype)
        weight = twin.affine_weight(codes, scale, zero_point, size, stored)
        assert torch.equal(packed.affine_rows(tiles, scale, zero_point, bits, size, stored)(0, rows), weight)
        for tokens in (1, 7):
            x, bias = torch.randn(tokens, cols, generator=generator(tokens)).to(dtype), torch.randn(rows).to(dtype)
            near(packed.affine_linear(x, tiles, scale, zero_point, bias, bits, size, stored), x, weight, bias)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_rounding_at_the_edges_of_a_format(isa: str, stored: torch.dtype) -> None:
    """Subnormals, ties and overflow of float16, ties of bfloat16: as torch rounds them."""
    scale = torch.tensor(
        [
            2.0**-24,
            3 * 2.0**-26,
            2.0**-15 * 1.0009765,
            65519 / 15,
            65521 / 15,
            1 + 2.0**-8,
            -(1 + 3 * 2.0**-9),
            2.0**-30,
        ]
    )
    codes = torch.arange(16, dtype=torch.uint8).expand(len(scale), 16).contiguous()
    tiles, zero_point = packed.tile(packed.pack(codes, 4), 4, 16), torch.zeros(len(scale), 1, dtype=torch.uint8)
    found = packed.affine_rows(tiles, scale[:, None], zero_point, 4, 16, stored)(0, len(scale))
    assert torch.equal(found, twin.affine_weight(codes, scale[:, None], zero_point, 16, stored))


@pytest.mark.fault("N14")
def test_a_token_does_not_depend_on_its_neighbours_nor_on_threads(isa: str) -> None:
    rows, cols, bits = 4099, 160, 4  # enough work for a second thread
    tiles, lut = packed.tile(packed.pack(codes_of(rows, cols, bits), bits), bits, cols), lut_of(rows, bits)
    x = torch.randn(7, cols, generator=generator(1))
    together = packed.lut_linear(x, tiles, lut, None, bits)
    assert all(torch.equal(packed.lut_linear(x[i : i + 1], tiles, lut, None, bits)[0], together[i]) for i in range(7))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(packed.lut_linear(x, tiles, lut, None, bits), together)
    finally:
        torch.set_num_threads(before)


def layers(
    bits: int = 4, rows: int = 10, cols: int = 48, dtype: torch.dtype = torch.float32
) -> list[LutLinear | AffineLinear]:
    """A layer of each kind, filled and laid out."""
    lut, affine = LutLinear(cols, rows, bits, True, dtype), AffineLinear(cols, rows, bits, True, dtype, group_size=16)
    words, bias = packed.pack(codes_of(rows, cols, bits), bits), torch.randn(rows, generator=generator(3)).to(dtype)
    scale, zero_point = grid_of(rows, cols // 16, bits, dtype)
    lut.load_state_dict({"weight": words, "lut": lut_of(rows, bits, dtype), "bias": bias})
    zeros = packed.pack(zero_point.T.contiguous(), bits).T.contiguous()
    stored = {
        "weight_packed": words,
        "weight_scale": scale,
        "weight_zero_point": zeros,
        "weight_shape": torch.tensor([rows, cols]),
    }
    affine.load_state_dict({**stored, "bias": bias})
    return [lut, affine]


def test_codes_are_held_once_and_stored_as_they_were(isa: str) -> None:
    for layer in layers(bits=3):
        words = packed.pack(codes_of(10, 48, 3), 3)
        assert "tiles" in dict(layer.named_buffers()) and layer.CODES not in dict(layer.named_buffers())
        assert torch.equal(layer.state_dict()[layer.CODES], words) and "tiles" not in layer.state_dict()
        again = copy.deepcopy(layer)
        again.load_state_dict(layer.state_dict())
        assert torch.equal(again.weight_hat, layer.weight_hat)
        x = torch.randn(2, 48)
        assert torch.equal(again(x), layer(x))
        half = copy.deepcopy(layer).to(torch.bfloat16)
        assert half.codes.dtype == torch.uint8 and half(x.bfloat16()).dtype == torch.bfloat16
        assert copy.deepcopy(layer).to("meta").codes.dtype == torch.int32


@pytest.mark.fault("O7")
def test_layers_without_the_extension_answer_alike(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for layer in layers():
        x = torch.randn(3, 48)
        fast = layer(x)
        monkeypatch.setenv("LEANGRID_KERNELS", "torch")
        torch.testing.assert_close(layer(x), fast)
        assert torch.equal(copy.deepcopy(layer).weight_hat, layer.weight_hat)  # still tiled: the twin reads it
        stored = copy.deepcopy(layer)
        stored.restore()
        assert stored.codes.dtype == torch.int32 and torch.equal(stored(x), layer(x))
        monkeypatch.setenv("LEANGRID_KERNELS", isa)


@pytest.mark.fault("O6")
def test_strides_and_gradients_of_the_input(isa: str) -> None:
    for layer in layers():
        wide = torch.randn(3, 96)
        near(layer(wide[:, ::2]), wide[:, ::2], layer.weight_hat, layer.bias)
        turned = torch.randn(48, 2).T
        near(layer(turned), turned, layer.weight_hat, layer.bias)
        x = torch.randn(2, 48, requires_grad=True)
        layer(x).sum().backward()
        torch.testing.assert_close(x.grad, layer.weight_hat.sum(0).expand(2, 48))


def test_wrong_inputs_are_one_clear_error() -> None:
    for layer in layers():
        with pytest.raises(ShapeError, match=r"bfloat16.*float32"):
            layer(torch.randn(1, 48).bfloat16())
        with pytest.raises(ShapeError, match="float64"):
            layer(torch.randn(1, 48).double())
        with pytest.raises(ShapeError, match=r"meta.*cpu"):
            layer(torch.empty(1, 48, device="meta"))
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(torch.randn(1, 48).bfloat16()).shape == (1, 10)  # as torch, it casts there
    lut, affine = layers()
    with pytest.raises(ShapeError, match="160"):
        packed.lut_linear(torch.randn(1, 160), lut.codes, lut.lut, None, 4)
    with pytest.raises(ShapeError, match="8 levels at 4 bits"):
        packed.lut_linear(torch.randn(1, 48), lut.codes, lut.lut[:, :8].contiguous(), None, 4)
    with pytest.raises(ShapeError, match="groups of 8"):
        packed.affine_linear(
            torch.randn(1, 48), affine.codes, affine.weight_scale, affine.zero_points(), None, 4, 8, torch.float32
        )
    with pytest.raises(ShapeError, match=r"\(1, 3\) words"):
        packed.tile(torch.zeros(1, 3, dtype=torch.int32), 4, 40)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ops_keep_the_rules_of_torch_library(dtype: torch.dtype) -> None:
    lut, affine = layers(dtype=dtype)
    x = torch.randn(3, 48).to(dtype)
    torch.library.opcheck(torch.ops.leangrid.lut_linear, (x, lut.codes, lut.lut, lut.bias, 4))
    grid = (affine.weight_scale, affine.zero_points(), None, 4, 16, dtype)
    torch.library.opcheck(torch.ops.leangrid.affine_linear, (x, affine.codes, *grid))
    assert torch.equal(torch.ops.leangrid.lut_linear(x, lut.codes, lut.lut, lut.bias, 4), lut(x))

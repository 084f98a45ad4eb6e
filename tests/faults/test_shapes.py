"""Rows S14, N3, N7 and O6 of the fault table: shapes that nobody planned for, and numbers that 16 bits do not hold."""

import json
from pathlib import Path

import pytest
import tiny_models
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from math_problems import layer
from torch import Tensor

import leangrid
from leangrid.errors import ShapeError
from leangrid.formats import FORMATS
from leangrid.inference.layers import AffineLinear, LutLinear, PackedLinear
from leangrid.recipe import Recipe
from leangrid.run.quantize import quantize
from leangrid.schemes import Scheme
from leangrid.solve.hessian import HessianSum
from leangrid.solve.layer import quantize_linear
from leangrid.storage.source import open_source

WINDOWS = tiny_models.tokens(4, 32)
pytestmark = pytest.mark.filterwarnings("ignore:leangrid runs without its C")


@pytest.mark.fault("S14")
@given(
    rows=st.integers(1, 33),
    cols=st.integers(1, 33),
    scheme=st.sampled_from(["NU2", "NU3", "NU4", "W2A16", "W3A16", "W4A16", "W8A16"]),
)
def test_any_small_shape_is_quantized_whole(rows: int, cols: int, scheme: str) -> None:
    """No tail is dropped: what a reader multiplies by is the grid's nearest idea of every single weight."""
    weight, hessian, _ = layer(rows, cols, seed=rows)
    codes, grid, loss = quantize_linear(weight, hessian, scheme)
    parsed = Scheme.parse(scheme)
    container = FORMATS["lut" if parsed.grid == "nonuniform" else "compressed-tensors"]
    packed = container.pack(codes, grid, torch.float32, parsed)
    read = container.dense(packed, parsed, (rows, cols))
    assert read.shape == weight.shape and torch.equal(read, grid.dequantize(codes).float())
    spread = (weight.amax(1) - weight.amin(1)).clamp_min(1e-6)[:, None]
    assert loss >= 0 and bool(((read - weight).abs() <= 2 * spread + 1e-3).all())


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """A Llama of 36 features, 2 heads, 33 in the MLP, with biases: nothing divides by 32."""
    config = hf.LlamaConfig(
        vocab_size=512,
        hidden_size=36,
        intermediate_size=33,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "odd")
    return tmp_path / "odd"


@pytest.mark.fault("S14")
@pytest.mark.parametrize("scheme", ["NU3", "W3A16"])
def test_a_model_of_odd_widths_with_biases(odd: Path, scheme: str, tmp_path: Path) -> None:
    result = quantize(odd, tmp_path / "out", Recipe(scheme=scheme), windows=WINDOWS)
    model, _ = leangrid.load(tmp_path / "out")
    packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    assert len(packed) == result.layers == 14 and result.exit_code == 0
    source = open_source(odd)
    for name, module in packed.items():
        original = source.read(f"{name}.weight")
        assert module.weight_hat.shape == original.shape
        assert float((module.weight_hat - original).norm() / original.norm()) < 0.4
        assert module.bias is not None and torch.equal(module.bias, source.read(f"{name}.bias"))


@pytest.mark.fault("S14")
def test_groups_that_do_not_divide_are_refused_by_layer(odd: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ShapeError, match=r"groups of 32 do not divide 36 columns \(model\.layers\.0\.self_attn\.q_proj\).*W4A16"
    ):
        quantize(odd, tmp_path / "out", Recipe(scheme="W4A16_G32"), windows=WINDOWS)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.fault("N3")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_empty_batch_counts_nothing(dtype: torch.dtype) -> None:
    x = torch.randn(5, 7).to(dtype)
    with_empty, alone = HessianSum(7), HessianSum(7)
    for batch in (x[:0], x, x[:0].view(0, 1, 7)):
        with_empty.add(batch)
    alone.add(x)
    assert with_empty.tokens == 5 and torch.equal(with_empty.finish().matrix, alone.finish().matrix)


@pytest.mark.fault("N7")
def test_activations_beyond_float16_are_computed(tmp_path: Path) -> None:
    """A float16 model whose MLP passes 65504 on the way: its own dtype gives infinities, the run does not."""
    source = tiny_models.save("llama2", tmp_path / "source", dtype=torch.float16)
    model = hf.AutoModelForCausalLM.from_pretrained(source)
    for block in model.model.layers:
        block.mlp.gate_proj.weight.data *= 400
        block.mlp.up_proj.weight.data *= 400
        block.mlp.down_proj.weight.data /= 10_000
    model.save_pretrained(source)
    seen: list[float] = []
    half = hf.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float16).eval()
    half.model.layers[-1].mlp.down_proj.register_forward_pre_hook(
        lambda _m, args: seen.append(float(args[0].abs().max()))
    )
    with torch.no_grad():
        half(WINDOWS)
    assert not seen[0] < float("inf")
    result = quantize(source, tmp_path / "out", Recipe(scheme="NU4"), windows=WINDOWS)
    assert result.rescues == 0 and result.exit_code == 0
    assert 0 < result.loss < result.loss_rounding < float("inf")
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["products"] == ["float32"]


def _views(x: Tensor) -> dict[str, Tensor]:
    """The same numbers, differently laid out."""
    rows, cols = x.shape
    wide = torch.zeros(rows, 3 * cols)
    wide[:, 1::3] = x
    shifted = torch.zeros(rows * cols + 1)
    shifted[1:] = x.reshape(-1)
    views = {"transposed": x.T.contiguous().T, "every third": wide[:, 1::3], "unaligned": shifted[1:].view(rows, cols)}
    if rows == 1:
        views["rows 2^40 apart"] = x.as_strided((1, cols), (2**40, 1))
    return views


@pytest.mark.fault("O6")
@pytest.mark.parametrize("tokens", [0, 1, 2, 17])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (3, 31), (16, 32), (17, 33), (33, 65), (40, 130)])
@pytest.mark.parametrize("scheme", ["NU3", "W4A16", "W3A16"])
def test_products_at_the_edges_of_every_tile(isa: str, scheme: str, rows: int, cols: int, tokens: int) -> None:
    generator = torch.Generator().manual_seed(rows * cols)
    parsed, weight = Scheme.parse(scheme), torch.randn(rows, cols, generator=generator)
    codes, grid, _ = quantize_linear(weight, torch.eye(cols), scheme)
    made: PackedLinear = (LutLinear if parsed.grid == "nonuniform" else AffineLinear)(
        cols, rows, parsed.bits, False, torch.float32
    )
    container = FORMATS["lut" if parsed.grid == "nonuniform" else "compressed-tensors"]
    made.load_state_dict(container.pack(codes, grid, torch.float32, parsed))
    x = torch.randn(tokens, cols, generator=generator)
    expected = made(x)
    torch.testing.assert_close(expected, x @ grid.dequantize(codes).float().T, rtol=1e-4, atol=1e-4)
    for name, view in _views(x).items():
        assert torch.equal(view, x) and torch.equal(made(view), expected), name
    assert torch.equal(made(x[:1].expand(3, cols)), made(x[:1].repeat(3, 1))) if tokens else True
    with pytest.raises(ShapeError):
        made(torch.zeros(2, cols + 1))

"""MatMulNBits in ONNX Runtime itself: x W^T of what we pack, and whole models that were exported, beside our own."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import tiny_models
import torch

import leangrid
from leangrid.errors import FormatError
from leangrid.formats import onnx as nbits
from leangrid.grids import AffineGrid, NonuniformGrid
from leangrid.inference.layers import AffineLinear
from leangrid.recipe import Recipe
from leangrid.schemes import Scheme

pytestmark = pytest.mark.interop


def session(path_or_bytes: bytes | str) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path_or_bytes, options, providers=["CPUExecutionProvider"])


def layer(scheme: Scheme, rows: int, cols: int) -> tuple[torch.Tensor, AffineGrid]:
    """Any code, any zero point, scales over many magnitudes (of both signs where symmetric)."""
    generator = torch.Generator().manual_seed(scheme.bits)
    groups = cols // scheme.group_size if scheme.group_size else 1
    scale = torch.exp(torch.rand(rows, groups, generator=generator) * 6 - 8).bfloat16().float()
    zero_point = torch.randint(scheme.levels, (rows, groups), generator=generator, dtype=torch.uint8)
    if scheme.symmetric:
        zero_point.fill_(scheme.levels // 2)
        scale *= torch.randint(2, scale.shape, generator=generator) * 2 - 1
    codes = torch.randint(scheme.levels, (rows, cols), generator=generator, dtype=torch.uint8)
    return codes, AffineGrid(scale, zero_point, scheme.bits, scheme.group_size)


def product(scheme: Scheme, codes: torch.Tensor, grid: AffineGrid, x: torch.Tensor) -> torch.Tensor:
    """x W^T by ONNX Runtime's operator."""
    rows, cols = codes.shape
    tensors = nbits.pack(codes, grid, scheme)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == nbits.layout(scheme, (rows, cols))
    stored = [onnx.numpy_helper.from_array(tensor.numpy(), name) for name, tensor in tensors.items()]
    node = onnx.helper.make_node(
        "MatMulNBits",
        ["x", *tensors],
        ["y"],
        domain="com.microsoft",
        K=cols,
        N=rows,
        bits=scheme.bits,
        block_size=nbits.block_size(scheme, cols),
    )
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node], "layer", [value("x", 1, ["tokens", cols])], [value("y", 1, ["tokens", rows])], stored
    )
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return torch.from_numpy(session(model.SerializeToString()).run(None, {"x": x.numpy()})[0])


@pytest.mark.parametrize(
    "name",
    ["W4A16_G64", "W4A16_G32_SYM", "W4A16_G16", "W4A16", "W4A16_G128", "W8A16_G64", "W8A16_SYM", "W2A16_G32", "W2A16"],
)
def test_onnxruntime_multiplies_by_exactly_our_weight(name: str) -> None:
    scheme = Scheme.parse(name)
    codes, grid = layer(scheme, 24, 384)
    expected = (grid.regrouped(384, nbits.block_size(scheme, 384))).dequantize(codes)
    assert torch.equal(nbits.dense(nbits.pack(codes, grid, scheme), scheme, 384), expected)
    seen = product(scheme, codes, grid, torch.eye(384)).T  # one weight a product: nothing is summed
    torch.testing.assert_close(seen, expected, rtol=3e-7, atol=0.0)
    x = torch.randn(5, 384, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(product(scheme, codes, grid, x), x @ expected.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("scheme", "cols", "kind", "words"),
    [
        ("NU4", 64, "linear", "affine grids only"),
        ("W3A16_G64", 64, "linear", "not 3"),
        ("W4A16_G64", 96, "linear", "groups of 64"),
        ("W4A16_G8", 64, "linear", "groups of 8"),
        ("W4A16", 40, "linear", "whole rows"),
        ("W4A16_G64", 64, "conv1d", "Conv1D"),
    ],
)
def test_what_the_operator_cannot_hold_is_refused_by_name(scheme: str, cols: int, kind: str, words: str) -> None:
    reason = nbits.refuse(Scheme.parse(scheme), "model.q", 64, cols, kind)
    assert (reason is not None and words in reason and "model.q" in reason and "Use" in reason) or "Serve" in str(
        reason
    )
    assert nbits.refuse(Scheme.parse("W4A16_G32"), "model.q", 64, 64) is None


def test_other_grids_are_not_packed() -> None:
    codes = torch.zeros(2, 32, dtype=torch.uint8)
    with pytest.raises(FormatError, match="NonuniformGrid"):
        nbits.pack(codes, NonuniformGrid(torch.arange(16.0).repeat(2, 1)), Scheme.parse("W4A16"))


def answer(path: Path, tokens: torch.Tensor, heads: int, head_dim: int) -> torch.Tensor:
    """Logits of the exported graph, without a past."""
    opened = session(str(path / "model.onnx"))
    feeds = {"input_ids": tokens.numpy(), "attention_mask": np.ones(tuple(tokens.shape), dtype=np.int64)}
    for value in opened.get_inputs():
        if value.name.startswith("past_key_values"):
            feeds[value.name] = np.zeros((len(tokens), heads, 0, head_dim), dtype=np.float32)
    return torch.from_numpy(opened.run(["logits"], feeds)[0])


@pytest.mark.parametrize(
    ("model", "scheme"),
    [
        ("llama3", "W4A16_G32"),
        pytest.param("qwen2", "W8A16_SYM", marks=pytest.mark.slow),
        pytest.param("llama3_tied", "W4A16", marks=pytest.mark.slow),
    ],
)
def test_an_exported_model_answers_as_ours(tiny: Callable[..., Path], tmp_path: Path, model: str, scheme: str) -> None:
    """Ours in float32 without the rounding to the stored dtype, which the operator does not make either."""
    recipe = Recipe(scheme=scheme, samples=4, length=32)
    leangrid.quantize(tiny(model, torch.bfloat16), tmp_path / "out", recipe, windows=tiny_models.tokens(4, 32))
    leangrid.export(tmp_path / "out", tmp_path / "onnx", to="onnx")
    assert leangrid.verify(tmp_path / "onnx") == []
    assert {"model.onnx", "model.onnx.data", "genai_config.json", "tokenizer.json", "manifest.json"} <= {
        p.name for p in (tmp_path / "onnx").iterdir()
    }
    ours = leangrid.load(tmp_path / "out", dtype=torch.float32)[0]
    packed = [module for module in ours.modules() if isinstance(module, AffineLinear)]
    for module in packed:
        module.stored_dtype = torch.float32
    nodes = [node.op_type for node in onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False).graph.node]
    assert 0 < nodes.count("MatMulNBits") <= len(packed)  # q, k and v are one
    tokens = tiny_models.tokens(2, 24)
    with torch.no_grad():
        expected = ours(tokens).logits
    heads, head_dim = ours.config.num_key_value_heads, ours.config.hidden_size // ours.config.num_attention_heads
    torch.testing.assert_close(answer(tmp_path / "onnx", tokens, heads, head_dim), expected, rtol=1e-4, atol=2e-4)


def test_what_cannot_be_exported_leaves_nothing(tiny: Callable[..., Path], tmp_path: Path) -> None:
    recipe = Recipe(scheme="NU4", samples=2, length=16)
    leangrid.quantize(tiny("llama2"), tmp_path / "out", recipe, windows=tiny_models.tokens(2, 16))
    with pytest.raises(FormatError, match="affine grids only"):
        leangrid.export(tmp_path / "out", tmp_path / "onnx", to="onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]

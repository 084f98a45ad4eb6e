"""What a budget chose, in the readers of other projects: llama.cpp's block types in one .gguf file, mlx-lm's settings
of each layer. (compressed-tensors' groups: test_mixed_schemes.py.)"""

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np
import pytest
import tiny_models
import torch
import transformers as hf
from foreign_readers import logits_of_mlx_lm, model_of_gguf

import leangrid
from leangrid.models.gguf_names import describe
from leangrid.models.result_reader import ResultReader
from leangrid.recipe import Recipe

pytestmark = pytest.mark.interop
WINDOWS, TOKENS = tiny_models.tokens(2, 16), tiny_models.tokens(2, 40)


def _spent(source: Path, out: Path, recipe: Recipe) -> ResultReader:
    """The result of a budget that took several candidates, no more than it may."""
    result = leangrid.quantize(source, out, recipe, windows=WINDOWS)
    assert recipe.bits is not None and result.bits_per_weight <= recipe.bits
    assert result.budget is not None and len(result.budget["widths"]) > 1
    return ResultReader.verified(out)


def test_llama_cpps_reader_and_transformers_read_a_type_a_tensor(tiny: Callable[..., Path], tmp_path: Path) -> None:
    source = tiny("llama2", torch.bfloat16)
    finished = _spent(source, tmp_path / "out", Recipe(scheme="Q4_0", bits=5.2))
    leangrid.export(tmp_path / "out", tmp_path / "file", to="gguf")
    found = {one.name: one for one in gguf.GGUFReader(str(tmp_path / "file" / "model.gguf")).tensors}
    names = describe(finished.checkpoint.config, "x")
    kinds, model = set(), hf.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    for name, (rows, _) in finished.layers.items():
        codes, grid = finished.layer(name)
        weight, order = grid.dequantize(codes), names.row_order(f"{name}.weight", rows)
        stored = found[names.tensor_name(f"{name}.weight")]
        kinds.add(stored.tensor_type.name)
        expected = weight if order is None else weight[order]
        assert np.array_equal(gguf.dequantize(stored.data, stored.tensor_type), expected.numpy()), name
        model.get_submodule(name).weight.data = weight
    assert kinds == {scheme.name for scheme in finished.schemes.values()} and len(kinds) > 1
    read = model_of_gguf(tmp_path / "file")
    with torch.no_grad():
        wanted, given = model(TOKENS).logits, read(TOKENS).logits
    torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_mlx_reads_each_layer_by_its_own_settings(tiny: Callable[..., Path], tmp_path: Path) -> None:
    source, out = tiny("llama2", torch.bfloat16), tmp_path / "out"
    finished = _spent(source, out, Recipe(scheme="W4A16_G32", format="mlx", bits=5.2))
    config = json.loads((out / "config.json").read_text())["quantization"]
    stored = mx.load(str(out / "model.safetensors"))
    assert isinstance(stored, dict)
    widths = set()
    for name in finished.layers:
        settings = config.get(name, {key: config[key] for key in ("bits", "group_size")})  # as mlx_lm.utils chooses
        scales, biases = (stored[f"{name}.{part}"].astype(mx.float32) for part in ("scales", "biases"))
        read = mx.dequantize(
            stored[f"{name}.weight"], scales, biases, group_size=settings["group_size"], bits=settings["bits"]
        )
        codes, grid = finished.layer(name)
        assert np.array_equal(np.array(read), grid.dequantize(codes).numpy()), name
        widths.add(settings["bits"])
    assert widths == {scheme.bits for scheme in finished.schemes.values()} and len(widths) > 1


def test_mlx_lm_opens_it(tiny: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("mlx_lm.utils", reason="mlx-lm is not installed")
    _spent(tiny("llama2", torch.bfloat16), tmp_path / "out", Recipe(scheme="W4A16_G32", format="mlx", bits=5.2))
    theirs = logits_of_mlx_lm(tmp_path / "out", TOKENS)
    ours, _ = leangrid.load(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(theirs, ours(TOKENS).logits, rtol=1e-3, atol=1e-3)

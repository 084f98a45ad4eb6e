"""models/result_reader.py: what a result says of its layers, and its weights as those of a plain checkpoint."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from quantized_checkpoints import Made, make_once
from safetensors.torch import load_file, save_file

from leangrid.errors import CheckpointError, FormatError
from leangrid.models.result_reader import DequantizedResult, ResultReader


@pytest.fixture(scope="module")
def made(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_once(tiny, tmp_path_factory)


@pytest.mark.parametrize(("model", "scheme"), [("llama3_tied", "W4A16_G32"), ("gpt2", "NU3"), ("bert", "W3A16_SYM")])
def test_layers_weights_and_what_is_beside_them(made: Made, model: str, scheme: str) -> None:
    source, out, dense = made(model, scheme, torch.bfloat16)
    result = ResultReader(out)
    assert set(result.layers) == set(dense) and result.scheme.name == scheme and result.dtype == torch.bfloat16
    assert result.has_lm_head == (model != "bert")
    for name, weight in dense.items():
        codes, grid = result.layer(name)
        assert result.layers[name] == tuple(weight.shape) == tuple(codes.shape)
        assert torch.equal(grid.dequantize(codes).bfloat16(), weight)
        assert torch.equal(result.weight(name), weight) and torch.equal(result.weight_in_model_dtype(name), weight)
    quantized = {f"{name}.weight" for name in dense}
    assert set(result.plain_tensors()) == set(load_file(source / "model.safetensors")) - quantized


def test_dequantized_it_is_the_plain_checkpoint(made: Made) -> None:
    source, out, dense = made("gpt2", "NU3")
    plain = DequantizedResult(ResultReader(out), dense)
    stored = load_file(source / "model.safetensors")
    assert "quantization_config" not in plain.config
    assert {name: tuple(info.shape) for name, info in plain.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in stored.items()
    }
    for name, tensor in stored.items():
        weight = dense.get(name.removesuffix(".weight"))  # [rows, cols]; the module stores the transpose
        assert torch.equal(plain.read(name), tensor if weight is None else weight.T), name
    plain.close()
    with pytest.raises(CheckpointError, match="is not stored quantized"):
        DequantizedResult(ResultReader(out), ["lm_head"])


def test_what_is_no_result_is_refused(made: Made, tmp_path: Path) -> None:
    source, out, dense = made("llama2", "W4A16_G32")
    with pytest.raises(FormatError, match="not quantized"):
        ResultReader(source)
    copied = shutil.copytree(source, tmp_path / "out")
    shutil.copy(out / "config.json", copied / "config.json")
    with pytest.raises(CheckpointError, match="none of the model's linears is stored quantized"):
        ResultReader(copied)
    damaged = shutil.copytree(out, tmp_path / "damaged")
    config = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps(config | {"dtype": "int8", "torch_dtype": "int8"}))
    with pytest.raises(CheckpointError, match="dtype is 'int8'"):
        ResultReader(damaged)
    (damaged / "config.json").write_text(json.dumps(config))
    tensors, name = load_file(damaged / "model.safetensors"), next(iter(dense))
    tensors[f"{name}.weight_scale"][0, 0] = float("nan")
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="NaN"):
        ResultReader(damaged).weight(name)

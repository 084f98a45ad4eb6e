"""Sources in fewer bits than 16, written by the software whose layouts they are, and dequantized by it: transformers'
FP8 and MXFP4, compressed-tensors' formats. What we read is equal in every bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers as hf
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.entrypoints.convert.converters.ct_dequantizer import CompressedTensorsDequantizer
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationStatus,
    apply_quantization_config,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from quantized_sources import store_linears
from safetensors.torch import load_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Quantize

from leangrid.storage.source import open_source

pytestmark = pytest.mark.interop


def assert_read_as(source: Path, theirs: dict[str, Tensor], dequantized: int) -> None:
    """Our checkpoint of ``source`` holds what ``theirs`` holds, which may hold tied tensors twice."""
    with open_source(source) as checkpoint:
        assert checkpoint.stored_as is not None and checkpoint.stored_as.tensors == dequantized
        assert set(checkpoint.tensors) <= set(theirs)
        for name in checkpoint.tensors:
            ours, tensor = checkpoint.read(name), theirs[name]
            assert ours.dtype == tensor.dtype and torch.equal(ours, tensor), name


def opened(source: Path) -> dict[str, Tensor]:
    """The tensors of the model as transformers dequantizes it where there is no GPU."""
    return hf.AutoModelForCausalLM.from_pretrained(source, dtype="auto").state_dict()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("block", "scales"),
    [((32, 32), "float"), ((16, 64), "float"), ((32, 32), "ue8m0"), ((1, 32), "ue8m0"), (None, "float")],
)
def test_fp8_of_transformers(
    tiny: Callable[..., Path], tmp_path: Path, block: Any, scales: str, dtype: torch.dtype
) -> None:
    config = hf.FineGrainedFP8Config(weight_block_size=block, scale_fmt=scales)
    quantizer = type("Quantizer", (), {"quantization_config": config})()
    source = store_linears(
        tiny("llama3", dtype),
        tmp_path / "source",
        config.to_dict() | {"quant_method": "fp8"},
        lambda name, weight: Fp8Quantize(quantizer).convert({name: weight}),
    )
    assert_read_as(source, opened(source), 14)


def test_mxfp4_of_gpt_oss(tmp_path: Path) -> None:
    tiny_models.save("gpt_oss", tmp_path / "plain", torch.bfloat16)
    generator = torch.Generator().manual_seed(0)

    def blocks(name: str, weight: Tensor) -> dict[str, Tensor]:
        experts, cols, rows = weight.shape
        codes = torch.randint(256, (experts, rows, cols // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(110, 130, (experts, rows, cols // 32), generator=generator, dtype=torch.uint8)
        return {f"{name}_blocks": codes, f"{name}_scales": scales}

    source = store_linears(
        tmp_path / "plain",
        tmp_path / "source",
        {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]},
        blocks,
        lambda name: name.endswith(("experts.gate_up_proj", "experts.down_proj")),
    )
    assert_read_as(source, opened(source), 4)


@pytest.mark.parametrize(
    "scheme",
    [
        "FP8",
        "FP8_DYNAMIC",
        "FP8_BLOCK",
        "W8A8",
        "W8A16",
        "W4A16",
        "W4A16_ASYM",
        "W4AFP8",
        "W3A16",
        "NVFP4A16",
        "NVFP4",
        "MXFP4A16",
        "MXFP8A16",
    ],
)
def test_checkpoints_of_compressed_tensors(tmp_path: Path, scheme: str) -> None:
    model = hf.LlamaForCausalLM(
        hf.LlamaConfig(
            hidden_size=256,
            intermediate_size=384,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=128,
        )
    ).bfloat16()
    scheme_of_all = preset_name_to_scheme(scheme, ["Linear"])
    apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": scheme_of_all}, ignore=["lm_head"]))
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            _fit(module)
    compressor = ModelCompressor.from_pretrained_model(model)
    assert compressor is not None
    compressor.compress_model(model)
    model.save_pretrained(tmp_path / "source")
    compressor.update_config(tmp_path / "source")
    # Its "Linear" stands for every weight here, where no module is known.
    dequantizer = CompressedTensorsDequantizer(tmp_path / "source", ignore=["model.embed_tokens", "re:.*norm$"])
    theirs = dequantizer.process(load_file(tmp_path / "source/model.safetensors"))
    theirs = {
        name: tensor for name, tensor in theirs.items() if ".input_scale" not in name and ".input_global" not in name
    }
    assert_read_as(tmp_path / "source", theirs, 7)


def _fit(module: Any) -> None:
    """Scales and zero points from the range of each group, by the library's own functions."""
    scheme, weight = module.quantization_scheme.weights, module.weight.data
    if scheme.strategy == "block":
        high, wide = scheme.block_structure
        groups = weight.unflatten(1, (-1, wide)).unflatten(0, (-1, high)).transpose(1, 2).flatten(2)
    elif scheme.strategy in ("group", "tensor_group"):
        groups = weight.unflatten(1, (-1, scheme.group_size))
    else:
        groups = weight.reshape(1, -1) if scheme.strategy == "tensor" else weight
    second = None
    if hasattr(module, "weight_global_scale"):
        second = generate_gparam(weight.min(), weight.max())
        module.weight_global_scale.data = second.reshape(1).float()
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme, global_scale=second)
    module.weight_scale.data = scale.reshape(module.weight_scale.shape).to(module.weight_scale.dtype)
    if hasattr(module, "weight_zero_point"):
        like = module.weight_zero_point
        like.data = zero.reshape(like.shape).to(like.dtype)
    module.quantization_status = QuantizationStatus.FROZEN


def test_their_logits_are_those_of_what_we_read(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """The dequantized tensors in a plain model, and the source in transformers itself."""
    config = hf.FineGrainedFP8Config(weight_block_size=(32, 32))
    quantizer = type("Quantizer", (), {"quantization_config": config})()
    source = store_linears(
        tiny("llama3", torch.bfloat16),
        tmp_path / "source",
        config.to_dict() | {"quant_method": "fp8"},
        lambda name, weight: Fp8Quantize(quantizer).convert({name: weight}),
    )
    theirs = hf.AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    ours = tiny_models.build("llama3", torch.bfloat16)
    with open_source(source) as checkpoint:
        ours.load_state_dict({name: checkpoint.read(name) for name in checkpoint.tensors}, strict=False)
        kind = hf.CONFIG_MAPPING[checkpoint.config["model_type"]].from_dict(checkpoint.config)
    assert getattr(kind, "quantization_config", None) is None
    tokens = tiny_models.tokens(2, 16)
    with torch.no_grad():
        assert torch.equal(ours(tokens).logits, theirs(tokens).logits)

"""A source in fewer bits than 16 gives the result that its dequantized tensors give as a plain checkpoint, byte for
byte, and the gate finds transformers' model of it in our walk."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import quantized_sources
import tiny_models
import torch
from quantized_sources import FP8, KINDS, store_linears
from safetensors.torch import load_file, save_file
from torch import Tensor

from leangrid.recipe import Recipe
from leangrid.run.quantize import quantize
from leangrid.storage.source import open_source

WINDOWS = tiny_models.tokens(4, 32)
Store = Callable[[str, Tensor], dict[str, Tensor]]


def rounded_fp8(block: int) -> Store:
    """FP8 with a scale for each block, near the weight that it is made of."""

    def store(name: str, weight: Tensor) -> dict[str, Tensor]:
        high, wide = (-(-size // block) for size in weight.shape)
        padded = torch.zeros(high * block, wide * block)
        padded[: weight.shape[0], : weight.shape[1]] = weight.float()
        largest = padded.reshape(high, block, wide, block).abs().amax((1, 3)).clamp_min(1e-6)
        codes = weight.float() / quantized_sources.spread(largest / 448, *weight.shape, block, block).float()
        return {name: codes.to(FP8), f"{name}_scale_inv": largest / 448}

    return store


def random_codes(kind: str) -> Store:
    generator = torch.Generator().manual_seed(0)

    def store(name: str, weight: Tensor) -> dict[str, Tensor]:
        made = KINDS[kind].make(*weight.shape, generator).tensors
        return {name.removesuffix("weight") + end: tensor for end, tensor in made.items()}

    return store


def dequantized_copy(source: Path, target: Path) -> Path:
    """The same checkpoint in 16 bits."""
    with open_source(source) as checkpoint:
        target.mkdir()
        tensors = {name: checkpoint.read(name).contiguous() for name in checkpoint.tensors}
        save_file(tensors, target / "model.safetensors", {"format": "pt"})
        (target / "config.json").write_text(json.dumps(checkpoint.config))
    for path in source.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            (target / path.name).write_bytes(path.read_bytes())
    return target


def assert_same_result(source: Path, work: Path, scheme: str = "W4A16_G32") -> dict[str, Any]:
    """Quantize ``source`` and its 16-bit copy; the manifest of the first."""
    plain = dequantized_copy(source, work / "plain")
    outs = {place: work / f"out-{place.name}" for place in (source, plain)}
    for place, out in outs.items():
        quantize(place, out, Recipe(scheme=scheme), windows=WINDOWS)
    ours, theirs = (load_file(next(out.glob("model*.safetensors"))) for out in outs.values())
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    configs = [json.loads((out / "config.json").read_text()) for out in outs.values()]
    assert configs[0] == configs[1] and configs[0]["quantization_config"]["quant_method"] == "compressed-tensors"
    return json.loads((outs[source] / "manifest.json").read_text())


@pytest.mark.parametrize("kind", ["fp8", "ct-int4", "ct-int8", "ct-nvfp4", "ct-fp8-row", "modelopt-nvfp4"])
def test_the_result_is_that_of_the_dequantized_checkpoint(kind: str, tmp_path: Path) -> None:
    entry = {"quant_method": "fp8", "weight_block_size": [24, 24]} if kind == "fp8" else KINDS[kind].entry
    source = store_linears(
        tiny_models.save("llama3", tmp_path / "tiny", torch.bfloat16),
        tmp_path / "source",
        entry,
        rounded_fp8(24) if kind == "fp8" else random_codes(kind),
    )
    manifest = assert_same_result(source, tmp_path)
    assert "error" not in manifest["quality"], manifest["quality"]


def test_deepseek_v3_in_fp8(tmp_path: Path) -> None:
    """Its experts are stored one by one and merged by transformers as it opens them. A layer that predicts a further
    token is no part of transformers' model; its weights are copied in 16 bits, as the result's config says of them."""
    tiny = tiny_models.save("deepseek_v3", tmp_path / "tiny", torch.bfloat16)
    stored = load_file(tiny / "model.safetensors")
    last = f"model.layers.{tiny_models.BLOCKS}"
    further = {
        name.replace(f"model.layers.{tiny_models.BLOCKS - 1}", last): tensor.flip(0)
        for name, tensor in stored.items()
        if name.startswith(f"model.layers.{tiny_models.BLOCKS - 1}.")
    }
    save_file(stored | further, tiny / "model.safetensors", {"format": "pt"})
    source = store_linears(
        tiny,
        tmp_path / "source",
        {"quant_method": "fp8", "weight_block_size": [16, 16]},
        rounded_fp8(16),
        lambda name: "_proj" in name and name.endswith(".weight"),
    )
    assert_same_result(source, tmp_path)
    result = load_file(tmp_path / "out-source" / "model.safetensors")
    assert {name for name in result if name.startswith(f"{last}.")} == further.keys()
    assert not {tensor.dtype for tensor in result.values()} & {FP8}
    for name, weight in further.items():
        assert (result[name].float() - weight.float()).norm() <= 0.05 * weight.float().norm(), name


def test_gpt_oss_in_mxfp4(tmp_path: Path) -> None:
    tiny_models.save("gpt_oss", tmp_path / "tiny", torch.bfloat16)
    generator = torch.Generator().manual_seed(0)

    def blocks(name: str, weight: Tensor) -> dict[str, Tensor]:
        experts, cols, rows = weight.shape
        shape = (experts, rows, cols // 32)
        codes = torch.randint(256, (*shape, 16), generator=generator, dtype=torch.uint8)
        exponents = torch.randint(119, 122, shape, generator=generator, dtype=torch.uint8)
        return {f"{name}_blocks": codes, f"{name}_scales": exponents}

    source = store_linears(
        tmp_path / "tiny",
        tmp_path / "source",
        {"quant_method": "mxfp4"},
        blocks,
        lambda name: name.endswith(("experts.gate_up_proj", "experts.down_proj")),
    )
    assert_same_result(source, tmp_path)

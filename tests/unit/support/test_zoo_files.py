"""The zoo's own reading of results (tests/support/zoo_files.py), on weights that this file packs."""

import json
from pathlib import Path

import pytest
import torch
import zoo_files
from safetensors.torch import save_file
from torch import Tensor


def _packed(weight: Tensor) -> dict[str, Tensor]:
    """Symmetric 8 bits, a scale a row, as docs/formats.md says."""
    step = weight.abs().amax(1, keepdim=True) * 2 / 255
    codes = (weight / step + 128).round().clamp(0, 255).to(torch.uint8).contiguous()
    words = torch.from_numpy(codes.numpy().view("int32").copy())
    return {"weight_packed": words, "weight_scale": step, "weight_shape": torch.tensor(weight.shape)}


def _write(folder: Path, tensors: dict[str, Tensor], config: dict) -> Path:
    folder.mkdir()
    save_file({name: x.contiguous() for name, x in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


CONFIG = {"quantization_config": {"config_groups": {"group_0": {"weights": {"num_bits": 8}}}}}


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_experts_apart_fill_the_fused_tensors_of_the_source(
    interleaved: bool, transposed: bool, tmp_path: Path
) -> None:
    draw = torch.Generator().manual_seed(0)
    gate, up, down = (torch.randn(4, *shape, generator=draw) for shape in ((32, 64), (32, 64), (64, 32)))
    both = torch.stack((gate, up), 2).flatten(1, 2) if interleaved else torch.cat((gate, up), 1)
    source = {"layers.0.moe.gate_up": both, "layers.0.moe.down": down}
    source = {name: x.mT if transposed else x for name, x in source.items()} | {"norm.weight": torch.ones(64)}
    result: dict[str, Tensor] = {"norm.weight": torch.ones(64)}
    for leaf, stack in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
        for expert, weight in enumerate(stack):
            owner = f"layers.0.moe.experts.{expert}.{leaf}"
            result |= {f"{owner}.{part}": x for part, x in _packed(weight).items()}
    made = zoo_files.refill(
        _write(tmp_path / "source", source, {}), _write(tmp_path / "result", result, CONFIG), transposed=False
    )
    assert sorted(made.quantized) == ["layers.0.moe.down", "layers.0.moe.gate_up"]
    assert not made.changed and not made.lost and not made.new
    for name in made.quantized:
        assert float((made.tensors[name] - source[name]).norm() / source[name].norm()) < 0.01


def test_a_changed_a_lost_and_a_new_tensor_are_named(tmp_path: Path) -> None:
    source = {"a.weight": torch.randn(32, 64), "norm.weight": torch.ones(64), "head.weight": torch.ones(8)}
    result = {f"a.{part}": x for part, x in _packed(source["a.weight"]).items()}
    result |= {"norm.weight": torch.zeros(64), "other.weight": torch.ones(8)}
    made = zoo_files.refill(
        _write(tmp_path / "source", source, {}), _write(tmp_path / "result", result, CONFIG), transposed=False
    )
    assert (made.quantized, made.changed, made.lost, made.new) == (
        ["a.weight"],
        ["norm.weight"],
        ["head.weight"],
        ["other.weight"],
    )

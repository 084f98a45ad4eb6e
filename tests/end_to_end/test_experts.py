"""Mixtures of experts: a checkpoint in, every expert's linears quantized under their own names, opened by leangrid."""

from pathlib import Path

import pytest
import torch

import leangrid
import tiny_models
from leangrid.models.skeleton import Skeleton
from leangrid.pipeline import quantize
from leangrid.recipe import Recipe
from leangrid.storage.safetensors import read_header
from leangrid.storage.source import open_source
from leangrid.storage.writer import verify

WINDOWS = tiny_models.tokens(6, 48)


def _logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize(
    ("name", "scheme"), [*((n, "NU4") for n in tiny_models.MIXTURES), ("qwen3_moe", "W4A16_G32"), ("mixtral", "W4A16_G32")]
)
def test_every_expert_is_quantized_under_the_names_of_its_checkpoint(name: str, scheme: str, tmp_path: Path) -> None:
    source = tiny_models.save(name, tmp_path / "source")
    result = quantize(source, tmp_path / "out", Recipe(scheme=scheme), windows=WINDOWS)
    assert result.exit_code == 0 and 0 < result.loss < result.loss_rounding
    assert verify(tmp_path / "out") == []
    skeleton = Skeleton(open_source(source))
    linears = [n for i in range(len(skeleton.blocks)) for n in skeleton.linear_names(i)]
    assert result.layers == len(linears)
    before, after = read_header(source / "model.safetensors"), read_header(tmp_path / "out" / "model.safetensors")
    assert {n.rpartition(".")[0] for n in before} == {n.rpartition(".")[0] for n in after}
    assert {f"{n}.weight" for n in linears} <= set(before)
    same = {n for n, info in before.items() if n in after and after[n].dtype == info.dtype}
    assert not [n for n in same if ".experts." in n], "an expert stayed as it was"
    assert {n for n in before if ".gate." in n or "expert_gate" in n} <= same, "a router was quantized"
    packed, _ = leangrid.load(tmp_path / "out")
    dense = tiny_models.build(name)
    _put(dense, {n: packed.get_submodule(n).weight_hat for n in linears})
    ids = WINDOWS[:2]
    torch.testing.assert_close(_logits(packed, ids), _logits(dense, ids), rtol=1e-4, atol=1e-4)
    assert (_logits(packed, ids) - _logits(tiny_models.build(name), ids)).abs().max() > 1e-3


def _put(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Write each linear into transformers' plain model, an expert's into its part of the fused tensors."""
    for name, weight in weights.items():
        path, _, leaf = name.replace("block_sparse_moe", "mlp").rpartition(".")
        owner, _, expert = path.rpartition(".")
        if not expert.isdigit():
            model.get_parameter(f"{name}.weight").data.copy_(weight)
            continue
        fused = model.get_submodule(owner)
        half = fused.gate_up_proj.shape[1] // 2
        target = fused.down_proj if leaf in ("down_proj", "w2") else fused.gate_up_proj
        rows = {"gate_proj": slice(half), "w1": slice(half), "up_proj": slice(half, None), "w3": slice(half, None)}.get(leaf, slice(None))
        target.data[int(expert), rows] = weight

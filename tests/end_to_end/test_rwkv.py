"""RWKV, whose forward pass rescales weights where its config says so."""

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from transformers import AutoModelForCausalLM, RwkvConfig, RwkvForCausalLM

import leangrid
from leangrid.errors import ArchitectureError

IDS = tiny_models.tokens(4, 24)
RECIPE = leangrid.Recipe(scheme="W8A16_G32", samples=4, length=24)


def _save_rwkv(rescale_every: int, directory: Path) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "attention_hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}
    config = RwkvConfig(vocab_size=tiny_models.VOCAB, context_length=128, **sizes, rescale_every=rescale_every)
    model = RwkvForCausalLM(config).eval()
    model.save_pretrained(directory)
    return model


def test_rwkv_whose_layers_are_rescaled_while_it_runs_is_refused(tmp_path: Path) -> None:
    """At its first pass it halves the weights of every second layer that follow the first ones."""
    model = _save_rwkv(2, tmp_path / "source")
    before = [block.attention.output.weight.clone() for block in model.rwkv.blocks]
    with torch.no_grad():
        model(IDS, use_cache=False)
    after = [block.attention.output.weight for block in model.rwkv.blocks]
    assert [torch.equal(one, other) for one, other in zip(before, after, strict=True)] == [True, True, False, False]
    with pytest.raises(ArchitectureError) as caught:
        leangrid.quantize(tmp_path / "source", tmp_path / "out", RECIPE, windows=IDS)
    words = "its forward pass changes the weight rwkv.blocks.2.attention.output.weight in place (div_)"
    assert words in str(caught.value) and "config.json" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@torch.no_grad()
@pytest.mark.parametrize("rescale_every", [0, 4])
def test_rwkv_whose_rescaling_changes_no_weight_is_quantized(rescale_every: int, tmp_path: Path) -> None:
    model = _save_rwkv(rescale_every, tmp_path / "source")
    leangrid.quantize(tmp_path / "source", tmp_path / "out", RECIPE, windows=IDS)
    expected = model(IDS, use_cache=False).logits
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for found in (leangrid.load(tmp_path / "out", dtype=torch.float32)[0], plain):
        torch.testing.assert_close(found(IDS, use_cache=False).logits, expected, rtol=0, atol=0.02)

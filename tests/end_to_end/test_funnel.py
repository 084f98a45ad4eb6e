"""Funnel, whose blocks are given the hidden states three times: as queries, keys and values."""

from pathlib import Path

import tiny_models
import torch
from transformers import FunnelConfig, FunnelModel

import leangrid
from leangrid.recipe import Recipe
from leangrid.run.quantize import quantize

IDS = tiny_models.tokens(8, 24)


@torch.no_grad()
def test_all_three_are_those_of_the_stream(tmp_path: Path) -> None:
    """With both streams, and tuned, where blocks are called again: keys of another pass would be refused, or worse."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "n_head": 2, "d_head": 16, "d_inner": 64, "num_decoder_layers": 1}
    config = FunnelConfig(vocab_size=tiny_models.VOCAB, block_sizes=[2, 1], **sizes)
    model = FunnelModel(config).eval()
    model.save_pretrained(tmp_path / "source")
    recipe = Recipe(scheme="W8A16_G32", tune=1)
    result = quantize(tmp_path / "source", tmp_path / "out", recipe, windows=IDS)
    assert not result.tuning["trouble"]
    held, tuned = IDS[-1:], result.tuning["blocks"][-1]
    theirs, ours = (m(held).last_hidden_state for m in (model, leangrid.load(tmp_path / "out", dtype=torch.float32)[0]))
    off = (ours - theirs).square().sum(-1) / theirs.square().sum(-1)
    assert float(off.mean()) < 1e-3
    torch.testing.assert_close(float(off.mean()), tuned["held_after"], rtol=0.05, atol=0)

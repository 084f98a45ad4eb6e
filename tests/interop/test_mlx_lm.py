"""What is said of mlx-lm is what mlx-lm does, where it is installed: it opens experts stacked for it, and no others."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
import torch
from foreign_readers import logits_of_mlx_lm

import leangrid

utils = pytest.importorskip("mlx_lm.utils", reason="mlx-lm is not installed")
pytestmark = pytest.mark.interop


def test_a_mixture_opens_as_the_export_stacks_it(tiny: Callable[..., Path], tmp_path: Path) -> None:
    source, windows = tmp_path / "source", tiny_models.tokens(2, 16)
    tiny_models.save("qwen3_moe", source, torch.bfloat16)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_experts": 4, "head_dim": 16}))  # as published ones
    recipe = leangrid.Recipe(scheme="RTN4_G32", format="mlx")
    leangrid.quantize(source, tmp_path / "apart", recipe, windows=windows, max_kl=1e9)
    leangrid.export(tmp_path / "apart", tmp_path / "stacked", to="mlx")
    words = [json.loads((tmp_path / one / "manifest.json").read_text())["opened_in"] for one in ("apart", "stacked")]
    assert words[0]["mlx-lm"].startswith("no: ValueError") and words[1] == {"mlx-lm": "yes"}
    with pytest.raises(ValueError, match="not in model"):
        utils.load_model(tmp_path / "apart")
    theirs = logits_of_mlx_lm(tmp_path / "stacked", windows)
    ours, _ = leangrid.load(tmp_path / "apart", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(theirs, ours(windows).logits, rtol=1e-4, atol=1e-4)

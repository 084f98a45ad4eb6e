"""What the ONNX export refuses by name before the builder runs; what it writes is in tests/interop/test_onnx.py."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
import torch

import leangrid
from leangrid.errors import FormatError

pytest.importorskip("onnxruntime_genai")


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("qwen3_moe", r"builds no graph of Qwen3MoeForCausalLM.*It knows: .*LlamaForCausalLM"),
        ("gpt_oss", r"holds experts in an operator of their own.*model\.layers\.0\.mlp\.experts"),
    ],
)
def test_what_the_builder_does_not_know_is_refused_before_it_runs(
    tiny: Callable[..., Path], model: str, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recipe = leangrid.Recipe(scheme="RTN4_G32_SYM")
    source, windows = tiny(model, torch.bfloat16), tiny_models.tokens(2, 16)
    leangrid.quantize(source, tmp_path / "out", recipe, windows=windows, max_kl=1e9)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("the builder was run"))
    with pytest.raises(FormatError, match=words):
        leangrid.export(tmp_path / "out", tmp_path / "onnx", to="onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]

"""Where the model writes its own calibration text."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch

from leangrid.inference import load as loading
from leangrid.recipe import Recipe
from leangrid.run import windows
from leangrid.run.inputs import RunInputs

load = loading.load


@pytest.mark.parametrize("fits", [True, False])
def test_a_model_writes_on_the_device_where_it_fits(
    fits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_models.save("llama2", tmp_path / "source", torch.bfloat16)
    asked, said = [], []

    def loaded(directory: Path, device: str, dtype: torch.dtype) -> Any:
        asked.append((device, dtype))
        if device == "cuda" and not fits:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return load(directory, dtype=dtype)

    monkeypatch.setattr(loading, "load", loaded)
    monkeypatch.setattr(windows, "release_cached_memory", lambda device: None)
    request = SimpleNamespace(device="cuda", progress=lambda event: said.append(event.message))
    inputs = RunInputs.__new__(RunInputs)  # with what is asked for here, and no more
    vars(inputs).update(
        request=request,
        skeleton=SimpleNamespace(has_lm_head=True, compute_dtype=torch.bfloat16),
        checkpoint=SimpleNamespace(directory=tmp_path / "source"),
        recipe=Recipe(calibration="self", samples=2, length=16),
        calibration={},
    )
    sampler = windows._sampler(inputs)
    assert sampler is not None and sampler(2, 16, 0).shape == (2, 16)
    assert asked == [("cuda", torch.bfloat16), *([] if fits else [("cpu", torch.float32)])]
    assert inputs.calibration == {"written_on": "cuda" if fits else "cpu"}
    assert any("does not fit on cuda: it writes on the CPU" in message for message in said) is not fits
    request.device = "cpu"
    asked.clear()
    sampler(2, 16, 0)
    assert asked == [("cpu", torch.float32)]

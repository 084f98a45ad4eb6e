"""Where the Triton tests run: on the GPU, or without one in Triton's interpreter (TRITON_INTERPRET=1, slow: small
shapes)."""

import os

import pytest
import torch

REASON = "no CUDA device, and TRITON_INTERPRET=1 is not set"


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The device of the test's tensors; the ops run in Triton there, and nowhere else."""
    pytest.importorskip("triton")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not interpreted and not torch.cuda.is_available():
        pytest.skip(REASON)
    monkeypatch.setenv("LEANGRID_KERNELS", "triton")
    return torch.device("cpu" if interpreted else "cuda")

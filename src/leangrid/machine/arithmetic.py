"""Which arithmetic the forward passes and the Hessian products use; everything that is solved stays in float32.

With ``bfloat16`` a bfloat16 model computes its forward passes in its own dtype, as it is served; processors with
bfloat16 tiles or dot products do that several times faster. The Hessians take those activations as they are: a product
of two bfloat16 numbers is exact in float32, sums are float32, and a Hessian of rounded inputs is still exactly positive
semidefinite.

On a CUDA device ``bfloat16`` means any 16-bit model's own dtype, and Hessians on TensorFloat-32 units: a bfloat16 or
float16 number is one of TF32 exactly, so those products lose nothing either. ``tfloat32`` is for float32 models:
weights and states in float32, products in TF32."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

_FLAGS = ("amx_bf16", "avx512_bf16")


def bfloat16_pays(dtype: torch.dtype, device: str) -> bool:
    """Whether products in bfloat16 are both harmless (the model is stored in it) and fast (this processor has them)."""
    return device == "cpu" and dtype == torch.bfloat16 and _switch() is not None and _processor_has_bfloat16()


def best_products(dtype: torch.dtype, device: str) -> str:
    """What ``auto`` means for a model stored in ``dtype`` on ``device``."""
    if torch.device(device).type == "cuda":
        return "bfloat16" if dtype == torch.bfloat16 else "tfloat32"
    return "bfloat16" if bfloat16_pays(dtype, device) else "float32"


def compute_dtype(kind: str, dtype: torch.dtype) -> torch.dtype:
    """Of weights and hidden states: a bfloat16 model's own where ``kind`` is bfloat16, else float32.

    Never float16: activations of late blocks pass its largest number, and the infinities would be found a block too
    late."""
    return dtype if kind == "bfloat16" and dtype == torch.bfloat16 else torch.float32


@contextmanager
def products(kind: str) -> Iterator[None]:
    """Inside the ``with``, float32 matrix products use ``kind`` operands: float32, bfloat16 (on the CPU; TF32 on CUDA),
    tfloat32 (CUDA)."""
    settings = [(torch.backends.cuda.matmul, "tf32")] if kind != "float32" and torch.cuda.is_available() else []
    switch = _switch()
    settings += [(switch, "bf16")] if kind == "bfloat16" and switch is not None else []
    before = [setting.fp32_precision for setting, _ in settings]
    for setting, value in settings:
        setting.fp32_precision = value
    try:
        yield
    finally:
        for (setting, _), value in zip(settings, before, strict=True):
            setting.fp32_precision = value


def _switch() -> Any:
    """torch's setting, absent before 2.9."""
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    return matmul if torch.backends.mkldnn.is_available() and hasattr(matmul, "fp32_precision") else None


def _processor_has_bfloat16() -> bool:
    try:
        flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        return False
    return any(flag in flags.split() for flag in _FLAGS)

"""Chooses the arithmetic of forward passes and Hessian products. Factorizations and sweeps are always in float32.

``float32``: all products in float32.

``bfloat16``: a bfloat16 model computes its forward passes in bfloat16, as when it is served, which processors with
instructions for it do several times faster. Hessians are sums of products of these activations. A product of two
bfloat16 numbers is exact in float32 and the sums are in float32, so the Hessian is that of the rounded activations, and
positive semidefinite. On a CUDA device these products use TensorFloat-32, in which bfloat16 numbers are exact too.

``tfloat32`` (CUDA): weights and hidden states are float32, products use TensorFloat-32."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

_FLAGS = ("amx_bf16", "avx512_bf16")  # processor flags in /proc/cpuinfo


def is_bfloat16_faster(dtype: torch.dtype, device: str) -> bool:
    """Whether bfloat16 products lose nothing (the model is stored in bfloat16) and are fast on this processor."""
    return device == "cpu" and dtype == torch.bfloat16 and _switch() is not None and _processor_has_bfloat16()


def choose_products(dtype: torch.dtype, device: str) -> str:
    """The arithmetic that ``auto`` stands for, for a model stored in ``dtype`` on ``device``: its name in a recipe."""
    if torch.device(device).type == "cuda":
        return "bfloat16" if dtype == torch.bfloat16 else "tfloat32"
    return "bfloat16" if is_bfloat16_faster(dtype, device) else "float32"


def choose_compute_dtype(kind: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of weights and hidden states in forward passes, for the arithmetic ``kind`` and a stored ``dtype``.

    It is bfloat16 if both are, else float32. It is never float16: activations of late blocks exceed its largest number,
    and the infinities would be noticed only a block later."""
    return dtype if kind == "bfloat16" and dtype == torch.bfloat16 else torch.float32


@contextmanager
def use_products(kind: str) -> Iterator[None]:
    """Inside the ``with``, products and convolutions of float32 tensors use the arithmetic ``kind``, whatever the
    process has chosen (``torch.set_float32_matmul_precision``); then the former one again.

    ``bfloat16`` means bfloat16 operands on the CPU and TensorFloat-32 on CUDA, ``float32`` IEEE arithmetic on both."""
    of_cuda, of_cpu = "ieee" if kind == "float32" else "tf32", "bf16" if kind == "bfloat16" else "ieee"
    backends: Any = torch.backends
    switches = [(backends.cuda.matmul, of_cuda), (backends.cudnn.conv, of_cuda), (_switch(), of_cpu)]
    settings = [(switch, value) for switch, value in switches if switch is not None]
    before = [setting.fp32_precision for setting, _ in settings]
    for setting, value in settings:
        setting.fp32_precision = value
    try:
        yield
    finally:
        for (setting, _), value in zip(settings, before, strict=True):
            setting.fp32_precision = value


def _switch() -> Any:
    """torch's setting for CPU products; None without oneDNN."""
    return getattr(torch.backends.mkldnn, "matmul", None) if torch.backends.mkldnn.is_available() else None


def _processor_has_bfloat16() -> bool:
    """Whether the processor has instructions for bfloat16 products; False on systems without /proc/cpuinfo."""
    try:
        flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        return False
    return any(flag in flags.split() for flag in _FLAGS)

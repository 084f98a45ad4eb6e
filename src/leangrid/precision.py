"""Which arithmetic the forward passes and the Hessian products use on a CPU; everything that is solved stays in float32.

With ``bfloat16`` linears and attention round their operands and results to bfloat16 and accumulate in float32, as the model
does when it is served in bfloat16; processors with bfloat16 tiles or dot products do that several times faster. Norms,
activations' sums and the residual stream stay in float32 (torch's autocast): rounding the residual at every layer would put
noise into the inputs that the correction then takes for an error of quantization. A Hessian of rounded inputs is still
exactly positive semidefinite, because both operands are the same rounded numbers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_FLAGS = ("amx_bf16", "avx512_bf16")


def bfloat16_pays(dtype: torch.dtype, device: str) -> bool:
    """Whether products in bfloat16 are both harmless (the model is stored in it) and fast (this processor has them)."""
    return device == "cpu" and dtype == torch.bfloat16 and _switch() is not None and _processor_has_bfloat16()


@contextmanager
def products(kind: str) -> Iterator[None]:
    """Inside the ``with``, forward passes and matrix products on the CPU use ``kind`` ("float32" or "bfloat16") operands."""
    switch = _switch()
    if kind != "bfloat16" or switch is None:
        yield
        return
    before = switch.fp32_precision
    switch.fp32_precision = "bf16"
    try:
        with torch.autocast("cpu", torch.bfloat16):
            yield
    finally:
        switch.fp32_precision = before


def operand(x: Tensor) -> Tensor:
    """``x`` as the products around it see it: rounded to bfloat16 inside ``products("bfloat16")``, itself otherwise."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) and x.is_floating_point() else x


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

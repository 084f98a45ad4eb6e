"""Whether Triton runs on this machine, and how its kernels are launched."""

from typing import Any

import torch
from torch import Tensor
from triton.runtime import driver


def check() -> None:
    """Raise Triton's own error where it cannot run: without a driver, without a C compiler for its launcher, on a GPU
    that it does not know."""
    driver.active.get_current_target()


def launch(kernel: Any, programs: int, first: Tensor, *rest: object, **options: object) -> None:
    """Run ``programs`` programs of a @triton.jit function on the device of its first argument; Triton by itself uses
    the current device.

    Products and sums are not fused, so that each float64 operation rounds as in plain torch (Triton 3.9 would fuse
    them, 3.10 does not)."""
    with torch.cuda.device_of(first):
        kernel[(programs,)](first, *rest, enable_fp_fusion=False, **options)

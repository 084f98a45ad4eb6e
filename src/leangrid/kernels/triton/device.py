"""Triton on this machine: whether it runs, and how a kernel is launched."""

from typing import Any

import torch
from torch import Tensor
from triton.runtime import driver


def check() -> None:
    """Raises what Triton raises where it cannot run: no driver, no C compiler for its launcher, a GPU it does not
    know."""
    driver.active.get_current_target()


def launch(kernel: Any, programs: int, first: Tensor, *rest: object, **options: object) -> None:
    """``programs`` programs of a @triton.jit function on the device of its first argument; Triton itself takes the
    current device.

    Products and sums are not fused, so that each float64 operation rounds as in the torch twin (Triton 3.9 fuses them,
    3.10 does not)."""
    with torch.cuda.device_of(first):
        kernel[(programs,)](first, *rest, enable_fp_fusion=False, **options)

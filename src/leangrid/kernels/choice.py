"""Which build runs an op: C++ for CPU tensors, Triton for CUDA tensors, the torch twins where those are missing or not
wanted.

``LEANGRID_KERNELS=torch|portable|avx2|avx512|triton`` overrides: torch means torch everywhere, the next three are for
CPU tensors alone, triton insists on Triton (for CPU tensors too, in its interpreter, where TRITON_INTERPRET=1)."""

import os
import warnings
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from leangrid.errors import RecipeError
from leangrid.kernels import native, plain


def ops(tensor: Tensor) -> ModuleType:
    """The module with the functions for this tensor's device; all have the same. RecipeError where the one wanted
    cannot run."""
    return _module(tensor.device)


def backend(device: torch.device | str = "cpu") -> str:
    """Which path tensors on ``device`` take: cpu-avx512, cpu-avx2, cpu-portable, triton or torch. Errors as ``ops``."""
    module = _module(torch.device(device))
    return native.backend() if module is native else "torch" if module is plain else "triton"


def _module(device: torch.device) -> ModuleType:
    wanted = native.wanted()
    if wanted == "triton":
        return _insisted(device)
    if device.type == "cpu":
        return native if native.available() else plain
    if device.type == "cuda" and wanted != "torch":
        module, why = _triton()
        if module is None:
            _notice(why)
        return module or plain
    return plain


def _insisted(device: torch.device) -> ModuleType:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not interpreted:
        raise RecipeError(
            f"LEANGRID_KERNELS=triton, but a tensor is on {device}",
            "environment",
            "Unset it, or set TRITON_INTERPRET=1 to run the kernels in Triton's interpreter (slow, for tests)",
        )
    module, why = _triton(interpreted)
    if module is None:
        raise RecipeError(
            f"LEANGRID_KERNELS=triton, but Triton does not run here: {why}", "environment", "Unset it: torch then runs"
        )
    return module


@cache
def _triton(interpreted: bool = False) -> tuple[ModuleType | None, str]:
    """The Triton kernels, or why they cannot run here."""
    try:
        module = import_module("leangrid.kernels.triton")
        if not interpreted:
            import_module("leangrid.kernels.triton.device").check()
    except Exception as error:  # its driver asks for a C compiler and a GPU it knows, and each fails in its own way
        return None, f"{type(error).__name__}: {error}"
    return module, ""


@cache
def _notice(why: str) -> None:
    warnings.warn(f"leangrid runs without its Triton kernels (slower, same results): {why}", stacklevel=2)

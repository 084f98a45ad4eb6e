"""Which implementation runs an op: C++ for CPU tensors, Triton for CUDA tensors, plain torch where those are missing or
LEANGRID_KERNELS asks for it.

``LEANGRID_KERNELS=torch|portable|avx2|avx512|triton`` overrides the choice: torch is used everywhere, the next three
concern CPU tensors alone, triton makes anything but Triton an error (CPU tensors then run in its interpreter, where
TRITON_INTERPRET=1)."""

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
    """The module whose functions compute on this tensor's device: native, triton or plain, which have the same names.

    RecipeError where LEANGRID_KERNELS names one that cannot run here."""
    return _module(tensor.device)


def backend(device: torch.device | str = "cpu") -> str:
    """Which implementation tensors on ``device`` get: "cpu-avx512", "cpu-avx2", "cpu-portable", "triton" or "torch".
    Raises as ``ops`` does."""
    module = _module(torch.device(device))
    return native.backend() if module is native else "torch" if module is plain else "triton"


def _module(device: torch.device) -> ModuleType:
    requested = native.requested()
    if requested == "triton":
        return _required_triton(device)
    if device.type == "cpu":
        return native if native.available() else plain
    if device.type == "cuda" and requested != "torch":
        module, why = _triton()
        if module is None:
            _warn_once(why)
        return module or plain
    return plain


def _required_triton(device: torch.device) -> ModuleType:
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
    """The module of the Triton kernels, or None and why they cannot run here."""
    try:
        module = import_module("leangrid.kernels.triton")
        if not interpreted:
            import_module("leangrid.kernels.triton.device").check()
    except Exception as error:  # its driver asks for a C compiler and a GPU it knows, and each fails in its own way
        return None, f"{type(error).__name__}: {error}"
    return module, ""


@cache
def _warn_once(why: str) -> None:
    warnings.warn(f"leangrid runs without its Triton kernels (slower, the same up to rounding): {why}", stacklevel=2)

"""Settings of torch that hold for whoever computes, such as autocast.

A pass through a model that is stopped where it has changed one would leave the change to everybody else, and a block
that is called alone would be called without it."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

Settings = Mapping[str, Any]

_READ: dict[str, Callable[[], Any]] = {
    "autocast": lambda: torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"),
    "torch.enable_grad": torch.is_grad_enabled,
    "torch.inference_mode": torch.is_inference_mode_enabled,
    "another default dtype": torch.get_default_dtype,
    "a transform of torch.func": torch._C._functorch.maybe_current_level,  # pyright: ignore[reportAttributeAccessIssue]
    "a mode of torch (TorchFunctionMode)": torch._C._len_torch_function_stack,
    "a mode of torch (TorchDispatchMode)": torch._C._len_torch_dispatch_stack,
}


def settings() -> Settings:
    """The present settings by their names."""
    return {name: read() for name, read in _READ.items()}


def entered_since(before: Settings) -> str | None:
    """The name of a setting that is another now than ``before``; None where all are the same."""
    return next((name for name, read in _READ.items() if read() != before[name]), None)

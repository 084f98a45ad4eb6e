"""What a model is run on: token ids of text, or everything that its processor made of a row with pictures."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

# Token ids, int64 [windows, length]; or a processor's tensors by the names under which the model takes them, of one
# row: ``input_ids`` [1, length] among them.
Inputs = Tensor | Mapping[str, Tensor]


def token_ids(inputs: Inputs) -> Tensor:
    """The token ids, int64 [windows, length]."""
    return inputs if isinstance(inputs, Tensor) else inputs["input_ids"]


def moved_inputs(inputs: Inputs, device: torch.device | str, dtype: torch.dtype) -> Inputs:
    """The same on ``device``, floating-point numbers in ``dtype``."""
    if isinstance(inputs, Tensor):
        return inputs.to(device)
    return {name: x.to(device, dtype if x.is_floating_point() else None) for name, x in inputs.items()}


def arguments_of(module: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """The arguments with which ``module`` reads ``inputs``, without a cache."""
    taken = inspect.signature(module.forward).parameters
    ids = token_ids(inputs)
    found: dict[str, Any] = {"input_ids": ids} if isinstance(inputs, Tensor) else dict(inputs)
    if takes_argument(module, "use_cache"):
        found["use_cache"] = False
    if "decoder_input_ids" in taken:
        found["decoder_input_ids"] = ids
    if "bbox" in taken and "bbox" not in found:  # where each token stands on a page: text alone stands nowhere
        found["bbox"] = torch.zeros(*ids.shape, 4, device=ids.device)
    return found


def takes_pictures(module: nn.Module) -> bool:
    """Whether the module's forward pass has an argument for pictures."""
    return any(name.startswith("pixel_values") for name in inspect.signature(module.forward).parameters)


def takes_argument(module: nn.Module, name: str) -> bool:
    """Whether the module's forward pass has an argument of this name."""
    taken = inspect.signature(module.forward).parameters
    return name in taken or any(parameter.kind == parameter.VAR_KEYWORD for parameter in taken.values())

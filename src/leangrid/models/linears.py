"""The linear layers of transformers' models: nn.Linear, and GPT-2's Conv1D, which stores the transposed weight.

A subclass counts where its forward pass multiplies by its weight and does nothing else."""

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

LINEARS = (nn.Linear, Conv1D)
_FORWARDS = (nn.Linear.forward, Conv1D.forward)
_known: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # with a forward of its class's own -> whether it is


def is_linear(module: nn.Module) -> bool:
    """Whether ``module`` multiplies its input by its weight, a parameter, adds its bias, and does nothing else."""
    if not isinstance(module, LINEARS) or makes_its_weight(module) or "forward" in vars(module):
        return False
    if type(module).forward in _FORWARDS:
        return True
    if module not in _known:  # two of one class may differ in an attribute
        with torch.device("cpu"):  # a model may be loaded under that of "meta"
            _known[module] = _multiplies(module)
    return _known[module]


def has_matrix(module: nn.Module) -> bool:
    """Whether ``module`` has a weight of two dimensions that is no table of embeddings: what engines take for a linear,
    such as the router of a mixture."""
    weight = module._parameters.get("weight")
    return isinstance(weight, Tensor) and weight.ndim == 2 and not isinstance(module, nn.Embedding)


def makes_its_weight(module: nn.Module) -> bool:
    """Whether a linear computes its weight of other parameters whenever it is called: weight norm, spectral norm and
    other parametrizations of torch.nn.utils."""
    return isinstance(module, LINEARS) and not isinstance(module._parameters.get("weight"), nn.Parameter)


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks of the model's own change what goes into a module, or what comes out of it."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear stores its weight as [cols, rows]."""
    return isinstance(module, Conv1D)


def rows_first(module: nn.Module, weight: Tensor) -> Tensor:
    """``weight`` as [rows, cols] from how the linear ``module`` stores it, or back."""
    return weight.t() if is_transposed(module) else weight


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(rows, cols) = (out_features, in_features) of one of ``LINEARS``."""
    weight: Any = module.weight
    rows, cols = weight.shape
    return (cols, rows) if is_transposed(module) else (rows, cols)


def linear_shapes(model: nn.Module) -> dict[str, tuple[tuple[int, int], str]]:
    """Every linear of ``model``, in its order: name -> ((rows, cols), "linear" or "conv1d")."""
    return {
        name: (linear_shape(module), "conv1d" if is_transposed(module) else "linear")
        for name, module in model.named_modules()
        if is_linear(module)
    }


def twin_of(module: nn.Module, parameters: Mapping[str, Tensor | None]) -> nn.Module:
    """A module of the same class with the same attributes and other ``parameters`` of its own, for a try of its forward
    pass."""
    twin = object.__new__(type(module))
    twin.__dict__.update(vars(module))
    twin.__dict__["_parameters"] = {
        name: None if tensor is None else nn.Parameter(tensor, requires_grad=False)
        for name, tensor in parameters.items()
    }
    return twin


def _multiplies(module: nn.Module) -> bool:
    """Whether the forward pass of a subclass gives what its base class gives, tried on random numbers."""
    base = Conv1D if is_transposed(module) else nn.Linear
    rows, cols, draw = 3, 4, torch.Generator().manual_seed(0)  # the caller's random numbers stay as they are
    stored: dict[str, Tensor | None] = {
        "weight": torch.randn((cols, rows) if base is Conv1D else (rows, cols), generator=draw)
    }
    stored["bias"] = None if getattr(module, "bias", None) is None else torch.randn(rows, generator=draw)
    twin = twin_of(module, stored)
    twin.__dict__.update({"in_features": cols, "out_features": rows, "nf": rows, "nx": cols})
    x = torch.randn(2, 5, cols, generator=draw)
    try:
        with torch.no_grad():
            ours, theirs = type(module).forward(twin, x), base.forward(twin, x)  # pyright: ignore
            return isinstance(ours, Tensor) and torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    except Exception:  # a forward pass of another kind may raise anything on these numbers
        return False

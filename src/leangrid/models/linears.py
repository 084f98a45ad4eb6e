"""The linear layers of transformers' models: nn.Linear, and GPT-2's Conv1D, which stores the transposed weight.

A subclass counts where its forward pass multiplies by its weight and does nothing else."""

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

LINEARS = (nn.Linear, Conv1D)
_FORWARDS = (nn.Linear.forward, Conv1D.forward)
_known: dict[type, bool] = {}  # subclass with a forward of its own -> whether it multiplies like its base


def is_linear(module: nn.Module) -> bool:
    """Whether ``module`` multiplies its input by its weight, adds its bias, and does nothing else."""
    if not isinstance(module, LINEARS):
        return False
    kind = type(module)
    if kind.forward in _FORWARDS:
        return True
    if kind not in _known:
        _known[kind] = _multiplies(module)
    return _known[kind]


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear stores its weight as [cols, rows]."""
    return isinstance(module, Conv1D)


def rows_first(module: nn.Module, weight: Tensor) -> Tensor:
    """``weight`` as [rows, cols] from how the linear ``module`` stores it, or back."""
    return weight.t() if is_transposed(module) else weight


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(rows, cols) = (out_features, in_features) of one of ``LINEARS``."""
    rows, cols = module.get_parameter("weight").shape
    return (cols, rows) if is_transposed(module) else (rows, cols)


def linear_shapes(model: nn.Module) -> dict[str, tuple[tuple[int, int], str]]:
    """Every linear of ``model``, in its order: name -> ((rows, cols), "linear" or "conv1d")."""
    return {
        name: (linear_shape(module), "conv1d" if is_transposed(module) else "linear")
        for name, module in model.named_modules()
        if is_linear(module)
    }


def _multiplies(module: nn.Module) -> bool:
    """Whether the forward pass of a subclass gives what its base class gives, tried on random numbers."""
    base = Conv1D if is_transposed(module) else nn.Linear
    rows, cols, draw = 3, 4, torch.Generator().manual_seed(0)  # the caller's random numbers stay as they are
    stored: dict[str, Tensor | None] = {
        "weight": torch.randn((cols, rows) if base is Conv1D else (rows, cols), generator=draw)
    }
    stored["bias"] = None if getattr(module, "bias", None) is None else torch.randn(rows, generator=draw)
    twin = object.__new__(type(module))
    twin.__dict__.update({key: value for key, value in vars(module).items() if key not in ("_parameters",)})
    twin.__dict__["_parameters"] = {
        name: None if tensor is None else nn.Parameter(tensor, requires_grad=False) for name, tensor in stored.items()
    }
    twin.__dict__.update({"in_features": cols, "out_features": rows, "nf": rows, "nx": cols})
    x = torch.randn(2, 5, cols, generator=draw)
    try:
        with torch.no_grad():
            ours, theirs = type(module).forward(twin, x), base.forward(twin, x)  # pyright: ignore
            return isinstance(ours, Tensor) and torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    except Exception:  # a forward pass of another kind may raise anything on these numbers
        return False

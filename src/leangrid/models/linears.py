"""The linear layers of transformers' models: nn.Linear, and GPT-2's Conv1D, which stores the transposed weight."""

from torch import nn
from transformers.pytorch_utils import Conv1D

LINEARS = (nn.Linear, Conv1D)


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(rows, cols) = (out_features, in_features) of one of ``LINEARS``."""
    rows, cols = module.get_parameter("weight").shape
    return (cols, rows) if isinstance(module, Conv1D) else (rows, cols)


def linear_shapes(model: nn.Module) -> dict[str, tuple[tuple[int, int], str]]:
    """Every linear of ``model``, in its order: name -> ((rows, cols), "linear" or "conv1d")."""
    return {
        name: (linear_shape(module), "conv1d" if isinstance(module, Conv1D) else "linear")
        for name, module in model.named_modules()
        if isinstance(module, LINEARS)
    }

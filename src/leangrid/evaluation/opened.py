"""Any model the user can name, loaded and ready to be measured."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from leangrid.inference.load import load
from leangrid.kernels import backend
from leangrid.models.gguf import is_gguf
from leangrid.storage.hub import locate_source
from leangrid.storage.source import check_finite


@dataclass(frozen=True)
class Opened:
    """A loaded model: its name as the user gave it, its place on disk, and whether it predicts next tokens."""

    name: str
    path: Path
    model: torch.nn.Module
    tokenizer: Any
    causal: bool


def open_model(name: str | Path, device: str = "cpu", dense: bool | None = None) -> Opened:
    """Load a leangrid result, a dense checkpoint, a hub id or a .gguf file (dequantized in a temporary directory).

    Args:
        device: on a CPU the model becomes float32: half precision is slower there, and its rounding would be measured
        too.
        dense: dequantize packed layers once instead of in every forward pass; the same numbers. None: where that is
            faster, which it is not on a CPU with native kernels.

    Raises:
        CheckpointError and its kin: whatever ``load`` refuses.
    """
    path = locate_source(str(name))
    on_cpu = torch.device(device).type == "cpu"
    dtype = torch.float32 if on_cpu else None
    dense = not (on_cpu and backend() != "torch") if dense is None else dense
    model, tokenizer = load(path, device=device, dtype=dtype, dense=dense and not is_gguf(path))
    for tensor, parameter in model.named_parameters():  # a model of NaN answers and measures all the same
        if parameter.is_floating_point():
            check_finite(parameter.data, tensor, path)
    return Opened(str(name), path, model.eval(), tokenizer, bool(model.can_generate()))

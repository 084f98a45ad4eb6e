"""Any model the user can name, loaded and ready to be measured."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from leangrid.load import load
from leangrid.models.gguf import dequantize, is_gguf
from leangrid.storage.hub import locate_source


@dataclass(frozen=True)
class Opened:
    """A loaded model: its name as the user gave it, its place on disk, and whether it predicts next tokens."""

    name: str
    path: Path
    model: torch.nn.Module
    tokenizer: Any
    causal: bool


def open_model(name: str | Path, device: str = "cpu", dense: bool = True) -> Opened:
    """Load a leangrid result, a dense checkpoint, a hub id or a .gguf file (dequantized in a temporary directory).

    Args:
        device: on a CPU the model becomes float32: half precision is slower there, and its rounding would be measured too.
        dense: dequantize packed layers once instead of in every forward pass; the same numbers.

    Raises:
        CheckpointError and its kin: whatever ``load`` refuses.
    """
    path = locate_source(str(name))
    dtype = torch.float32 if torch.device(device).type == "cpu" else None
    if not is_gguf(path):
        model, tokenizer = load(path, device=device, dtype=dtype, dense=dense)
        return _opened(name, path, model, tokenizer)
    with tempfile.TemporaryDirectory(prefix="leangrid-") as folder:
        directory = Path(folder) / "model"
        dequantize(path, directory)
        model, tokenizer = load(directory, device=device, dtype=dtype)
        return _opened(name, path, model, tokenizer)


def _opened(name: str | Path, path: Path, model: Any, tokenizer: Any) -> Opened:
    return Opened(str(name), path, model.eval(), tokenizer, bool(model.can_generate()))

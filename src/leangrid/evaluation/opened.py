"""Any model that the user can name, loaded and ready to be measured."""

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
    """A loaded model.

    Attributes:
        name: as the user gave it.
        path: its place on disk.
        model: in evaluation mode.
        tokenizer: None where it has none.
        has_lm_head: whether it predicts next tokens; an encoder does not.
    """

    name: str
    path: Path
    model: torch.nn.Module
    tokenizer: Any
    has_lm_head: bool

    @property
    def positions(self) -> int | None:
        """How many tokens the model takes at most; None where its config does not say."""
        config: Any = self.model.config
        limit = getattr(config.get_text_config(), "max_position_embeddings", None)
        return limit if isinstance(limit, int) and limit > 0 else None

    @property
    def embedding_rows(self) -> int | None:
        """How many tokens its input embedding has rows for; None where it has no such embedding."""
        model: Any = self.model
        embedding = model.get_input_embeddings()
        return None if embedding is None else int(embedding.weight.shape[0])

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return next(iter((*self.model.parameters(), *self.model.buffers()))).device


def load_model(name: str | Path, device: str = "cpu", dense: bool | None = None) -> Opened:
    """Load a leangrid result, a dense checkpoint, a hub id or a .gguf file (dequantized in a temporary directory).

    Args:
        name: what to load.
        device: where. On a CPU the model becomes float32: half precision is slower there, and its rounding would be
            measured too.
        dense: dequantize packed layers once instead of in every forward pass; the same numbers. None: where that is
            faster, which is everywhere but on a CPU with native kernels.

    Raises:
        CheckpointError: weights that are not finite, and whatever ``leangrid.load`` refuses.
    """
    path = locate_source(str(name))
    on_cpu = torch.device(device).type == "cpu"
    dtype = torch.float32 if on_cpu else None
    dense = not (on_cpu and backend() != "torch") if dense is None else dense
    model, tokenizer = load(path, device=device, dtype=dtype, dense=dense and not is_gguf(path))
    for (
        tensor,
        parameter,
    ) in model.named_parameters():  # a model with NaN weights would run and be measured all the same
        if parameter.is_floating_point():
            check_finite(parameter.data, tensor, path)
    return Opened(str(name), path, model.eval(), tokenizer, bool(model.can_generate()))

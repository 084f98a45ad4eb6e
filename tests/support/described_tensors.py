"""Tensors by name without their values, as a checkpoint's header describes them, and models on the meta device."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers as hf
from safetensors.torch import load_file
from torch import Tensor

from leangrid.storage.dtypes import NAMES


@dataclass(frozen=True)
class Shaped:
    shape: tuple[int, ...]
    dtype: str  # as safetensors names it


def described(tensors: Mapping[str, Tensor]) -> dict[str, Shaped]:
    return {name: Shaped(tuple(tensor.shape), NAMES[tensor.dtype]) for name, tensor in tensors.items()}


def empty(model: hf.PreTrainedModel) -> hf.PreTrainedModel:
    """The same model on the meta device. To be made before ``model`` is saved, which changes its config."""
    with torch.device("meta"):
        twin = type(model)(deepcopy(model.config))
    twin.tie_weights()
    return twin


def saved(model: hf.PreTrainedModel, directory: Path) -> dict[str, Tensor]:
    """What transformers stores of the model, under the names of published checkpoints."""
    hf.utils.logging.disable_progress_bar()
    model.save_pretrained(directory)
    return load_file(directory / "model.safetensors")

"""How far two encoders are apart: the angle between their embeddings, since encoders predict no next token."""

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor


def states(model: torch.nn.Module, **inputs: Tensor) -> Float[Tensor, "batch tokens width"]:
    """The last hidden states of the encoder, without the head that the model may have."""
    output: Any = getattr(model, "base_model", model)(**inputs)
    return output.last_hidden_state


def mean_pooled(model: torch.nn.Module, window: Int64[Tensor, " tokens"]) -> Float[Tensor, " width"]:
    """The mean of the last hidden states over one unpadded window, float64."""
    return states(model, input_ids=window[None])[0].double().mean(0)


def cosine_distance(first: Float[Tensor, "windows width"], second: Float[Tensor, "windows width"]) -> float:
    """The mean over windows of 1 - cosine similarity: 0 for equal directions, 1 for orthogonal ones."""
    return float((1 - torch.cosine_similarity(first, second, dim=-1)).mean())

"""Perplexity by the procedure of Frantar et al. 2022: text joined, tokenized once, cut in non-overlapping windows."""

import math

import torch
from jaxtyping import Float, Int64
from torch import Tensor

CHUNK = 128  # positions whose log-probabilities are computed at once


def negative_log_likelihood(
    logits: Float[Tensor, "tokens vocab"], tokens: Int64[Tensor, " tokens"]
) -> Float[Tensor, " predicted"]:
    """-log p(next token), in nats, of the tokens - 1 predicted tokens of one window; float64 [tokens - 1]."""
    parts = []
    for start in range(0, len(tokens) - 1, CHUNK):
        stop = min(start + CHUNK, len(tokens) - 1)
        log_probs = torch.log_softmax(logits[start:stop].float(), -1)
        parts.append(-log_probs.gather(-1, tokens[start + 1 : stop + 1, None])[:, 0].double())
    return torch.cat(parts)


def perplexity(nll: Float[Tensor, " predicted"]) -> float:
    """exp of the mean negative log-likelihood (nats); infinite where that overflows a float."""
    mean = float(nll.mean())
    return math.exp(mean) if mean < 700 else math.inf

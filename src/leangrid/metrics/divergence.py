"""KL(reference || model) and top-1 agreement, position by position, with the reference computed once for several
models."""

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from leangrid.errors import ShapeError
from leangrid.metrics.perplexity import CHUNK, negative_log_likelihood

Logits = Callable[[Int64[Tensor, " tokens"]], Float[Tensor, "tokens vocab"]]


@dataclass(frozen=True)
class Divergence:
    """Of one window: KL in nats (float64) and whether both models prefer the same next token, for each predicted
    token."""

    kl: Float[Tensor, " predicted"]
    agrees: Bool[Tensor, " predicted"]


def divergence(
    reference: Float[Tensor, "predicted reference_vocab"], logits: Float[Tensor, "tokens vocab"]
) -> Divergence:
    """KL(reference || model) per predicted token.

    Args:
        reference: log-probabilities of the reference, float32 or float16 (then renormalized: rounding moved their sum).
        logits: the model's, one position more; the last predicts beyond the window and is left out.

    Raises:
        ShapeError: the two vocabularies differ.
    """
    if reference.shape[-1] != logits.shape[-1]:
        raise ShapeError(
            f"a vocabulary of {logits.shape[-1]} against the reference's {reference.shape[-1]}",
            "--reference",
            "Compare a model with the checkpoint it was made from",
        )
    kls, agreements = [], []
    for start in range(0, len(reference), CHUNK):
        chunk = reference[start : start + CHUNK]
        expected = torch.log_softmax(chunk.float(), -1) if chunk.dtype == torch.float16 else chunk
        found = torch.log_softmax(logits[start : start + len(chunk)].float(), -1)
        kls.append((expected.exp() * (expected - found)).sum(-1, dtype=torch.float64))
        agreements.append(expected.argmax(-1) == found.argmax(-1))
    return Divergence(torch.cat(kls), torch.cat(agreements))


class Reference:
    """The original's log-probabilities on all windows, to compare several models with.

    They are kept in memory in float32 where that fits in ``budget`` bytes, else in float16 (top-1 ties aside this moves
    a mean KL by less than 1e-5). Where neither fits, the original is run again for each model: it then stays loaded,
    and ``kept`` is False."""

    def __init__(self, logits: Logits, windows: Int64[Tensor, "windows length"], budget: int | None = None) -> None:
        self._logits: Logits | None = logits
        self._windows = windows
        self._kept: list[Tensor] = []
        budget = _budget() if budget is None else budget
        dtype: torch.dtype | None = None
        nll = []
        for index, window in enumerate(windows):
            found = logits(window)
            nll.append(negative_log_likelihood(found, window))
            if index == 0:
                elements = len(windows) * (len(window) - 1) * found.shape[-1]
                dtype = next(
                    (kind for kind in (torch.float32, torch.float16) if elements * kind.itemsize <= budget), None
                )
            if dtype is not None:
                self._kept.append(_log_probs(found, dtype))
        self.nll: Float[Tensor, " predicted"] = torch.cat(nll)
        self.kept = dtype is not None
        if self.kept:
            self._logits = None  # lets the caller's model go

    def log_probs(self, index: int) -> Float[Tensor, "predicted vocab"]:
        """Of window ``index``, float32 or float16 [length - 1, vocab]."""
        if self._logits is None:
            return self._kept[index]
        return _log_probs(self._logits(self._windows[index]), torch.float32)


def _log_probs(logits: Float[Tensor, "tokens vocab"], dtype: torch.dtype) -> Float[Tensor, "predicted vocab"]:
    result = torch.empty((len(logits) - 1, logits.shape[-1]), dtype=dtype)
    for start in range(0, len(result), CHUNK):
        stop = min(start + CHUNK, len(result))
        result[start:stop] = torch.log_softmax(logits[start:stop].float(), -1)
    return result


def _budget() -> int:
    """4 GiB, or a quarter of the machine's memory where that is less."""
    try:
        physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not told on this system
        return 4 << 30
    return min(4 << 30, physical // 4)

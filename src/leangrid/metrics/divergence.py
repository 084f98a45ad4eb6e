"""KL(reference || model) and top-1 agreement, position by position, with the reference computed once for several
models."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from leangrid.errors import ShapeError
from leangrid.metrics.perplexity import CHUNK, negative_log_likelihood

Logits = Callable[[Int64[Tensor, " tokens"]], Float[Tensor, "tokens vocab"]]


@dataclass(frozen=True)
class Divergence:
    """How far two models are apart on one window, for each predicted token.

    Attributes:
        kl: KL(reference || model) in nats, float64.
        agrees: whether both give the same token the highest probability.
    """

    kl: Float[Tensor, " predicted"]
    agrees: Bool[Tensor, " predicted"]


def divergence(
    reference: Float[Tensor, "predicted reference_vocab"], logits: Float[Tensor, "tokens vocab"]
) -> Divergence:
    """KL(reference || model) per predicted token.

    Args:
        reference: log-probabilities of the reference, float32, or float16, which is normalized again because rounding
            changed the sum of the probabilities.
        logits: logits of the model for all tokens of the window; those of the last token, whose successor is not in the
            window, are left out.

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


def mean_divergence(
    reference: Float[Tensor, "*batch vocab"], logits: Float[Tensor, "*batch vocab"]
) -> Float[Tensor, ""]:
    """The mean over positions of KL(reference || model) in nats, float32, of logits of both; differentiable by
    ``logits`` alone. One tensor as large as they are is made, none where no gradient is asked for."""
    return _MeanDivergence.apply(logits, reference)  # pyright: ignore[reportReturnType]


class _MeanDivergence(torch.autograd.Function):
    """The gradient by the logits of a position is (q - p) / positions, p and q the two distributions."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, reference: Tensor) -> Tensor:
        given, wanted = logits.flatten(0, -2), reference.flatten(0, -2)
        slope = torch.empty_like(given) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float64, device=given.device)
        for start in range(0, len(given), CHUNK):
            part = slice(start, start + CHUNK)
            p, q = (torch.log_softmax(one[part].float(), -1) for one in (wanted, given))
            total += (p.exp() * (p - q)).sum(dtype=torch.float64)
            if slope is not None:
                slope[part] = q.exp_().sub_(p.exp_()).div_(len(given))
        ctx.slope = None if slope is None else slope.view_as(logits)
        return (total / len(given)).float()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return ctx.slope.mul_(gradients[0]), None


class ReferenceLogits:
    """The original's log-probabilities on all windows, to compare several models with.

    They are held in memory in float32 where that fits in ``budget`` bytes, else in float16, which changes a mean KL by
    less than 1e-5. Where neither fits, the original stays loaded and is run again for each model.

    Args:
        logits: computes the original's logits of one window.
        windows: token ids.
        budget: bytes; None: 4 GiB, or a quarter of the machine's memory where that is less.

    Attributes:
        nll: -log p of each predicted token under the original, in nats, float64.
        in_memory: whether the log-probabilities are held.
    """

    def __init__(self, logits: Logits, windows: Int64[Tensor, "windows length"], budget: int | None = None) -> None:
        self._logits: Logits | None = logits
        self._windows = windows
        self._held: list[Tensor] = []
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
                self._held.append(_log_probs(found, dtype))
        self.nll: Float[Tensor, " predicted"] = torch.cat(nll)
        self.in_memory = dtype is not None
        if self.in_memory:
            self._logits = None  # lets the caller's model go

    def log_probs(self, index: int) -> Float[Tensor, "predicted vocab"]:
        """Log-probabilities of window ``index``, float32 or float16 [length - 1, vocab]."""
        if self._logits is None:
            return self._held[index]
        return _log_probs(self._logits(self._windows[index]), torch.float32)


def _log_probs(logits: Float[Tensor, "tokens vocab"], dtype: torch.dtype) -> Float[Tensor, "predicted vocab"]:
    result = torch.empty((len(logits) - 1, logits.shape[-1]), dtype=dtype)
    for start in range(0, len(result), CHUNK):
        stop = min(start + CHUNK, len(result))
        result[start:stop] = torch.log_softmax(logits[start:stop].float(), -1)
    return result


def _budget() -> int:
    """The default of ``ReferenceLogits``'s budget."""
    try:
        physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # this system does not say
        return 4 << 30
    return min(4 << 30, physical // 4)

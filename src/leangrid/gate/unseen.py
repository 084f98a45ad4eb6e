"""Text that calibration did not see, for the quality gate: more of the same corpus where there is more, else prose that
Python carries."""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch
from jaxtyping import Int64
from torch import Tensor

from leangrid.data.calibration import cut_windows, find_affixes, tokenize_text
from leangrid.models.skeleton import Skeleton
from leangrid.models.tokenizer import load_tokenizer
from leangrid.planning.sizes import GATE_LENGTH, GATE_WINDOWS

_CHARACTERS = 16 * GATE_WINDOWS * GATE_LENGTH  # beyond any tokenizer's average


@dataclass(frozen=True)
class Unseen:
    """Windows that calibration did not see, int64 [windows, length], and the text they are from, in words."""

    windows: Int64[Tensor, "windows length"]
    text: str


def unseen_windows(
    skeleton: Skeleton, calibration: str, length: int, left_over: Int64[Tensor, "windows length"] | None
) -> Unseen | None:
    """Up to two windows that the calibration did not hold, the same for the same recipe.

    Args:
        skeleton: the original, whose tokenizer is used.
        calibration: the recipe's corpus.
        length: tokens of a calibration window.
        left_over: what the corpus had beyond the calibration's windows; None where it had no more.

    Returns:
        None without a tokenizer that fits, or without text.
    """
    if left_over is not None:
        corpus = "the same documentation" if calibration == "embedded" else Path(calibration).name
        return Unseen(left_over, f"other text of {corpus}")
    tokens = None if calibration == "embedded" else _prose(skeleton, min(length, GATE_LENGTH))
    return None if tokens is None else Unseen(tokens, "Python's documentation")


def _prose(skeleton: Skeleton, length: int) -> Tensor | None:
    """Windows of the language reference, which Python carries as text: the beginning of its first topics."""
    tokenizer = load_tokenizer(skeleton.checkpoint.directory)
    try:
        topics: dict[str, str] = import_module("pydoc_data.topics").topics
    except ImportError:  # some distributions leave it out
        return None
    if tokenizer is None:
        return None
    around = find_affixes(tokenizer)
    if length <= len(around.prefix) + len(around.suffix):
        return None
    text = "\n\n".join(topics[name].strip() for name in sorted(topics))[:_CHARACTERS]
    found = cut_windows(tokenize_text(tokenizer, text, around), length, around)[:GATE_WINDOWS]
    if not len(found) or int(found.max()) >= skeleton.vocabulary:
        return None
    return found.to(torch.int64).contiguous()

"""Text that calibration did not see, for the quality gate: more of the same corpus where there is more, else prose that
Python carries."""

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from leangrid.data.calibration import affixes, cut, tokenize
from leangrid.models.tokenizer import load_tokenizer
from leangrid.planning.sizes import GATE_LENGTH, GATE_WINDOWS
from leangrid.run.open_run import Prepared
from leangrid.run.quality_gate import Unseen

_CHARACTERS = 16 * GATE_WINDOWS * GATE_LENGTH  # beyond any tokenizer's average


def unseen_windows(prepared: Prepared, windows: Int64[Tensor, "samples length"]) -> Unseen | None:
    """Up to two windows as long as the calibration's, the same for the same recipe; None without a tokenizer that fits,
    or without text.

    What the corpus had beyond the calibration's windows was kept with them (calibration_windows).
    """
    saved = (prepared.journal.load_named("windows") or {}).get("unseen")
    if saved is not None:
        name = prepared.recipe.calibration
        return Unseen(saved, f"other text of {'the same documentation' if name == 'embedded' else Path(name).name}")
    if prepared.recipe.calibration == "embedded":
        return None
    tokens = _prose(prepared, min(windows.shape[1], GATE_LENGTH))
    return None if tokens is None else Unseen(tokens, "Python's documentation")


def _prose(prepared: Prepared, length: int) -> Tensor | None:
    """Windows of the language reference, which Python carries as text: the beginning of its first topics."""
    tokenizer = load_tokenizer(prepared.checkpoint.directory)
    try:
        topics: dict[str, str] = import_module("pydoc_data.topics").topics
    except ImportError:  # some distributions leave it out
        return None
    if tokenizer is None:
        return None
    around = affixes(tokenizer)
    if length <= len(around.prefix) + len(around.suffix):
        return None
    text = "\n\n".join(topics[name].strip() for name in sorted(topics))[:_CHARACTERS]
    found = cut(tokenize(tokenizer, text, around), length, around)[:GATE_WINDOWS]
    table: Any = prepared.skeleton.model.get_input_embeddings()
    if not len(found) or int(found.max()) >= table.weight.shape[0]:
        return None
    return found.to(torch.int64).contiguous()

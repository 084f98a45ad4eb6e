"""Which module of a model is run for the walk: the first that runs on text alone."""

from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from leangrid.errors import ArchitectureError, LeangridError
from leangrid.models.assumptions import LONGER, AssumptionError
from leangrid.models.discovery import Structure, discover
from leangrid.models.model_inputs import arguments_of

_TEXTS = (4, 16)  # tokens of the text on which a model is looked at; more where its forward pass does not take so few


def find_entry(model: PreTrainedModel, base: nn.Module) -> tuple[nn.Module, Structure]:
    """The first of base model, whole model and decoder that runs on text alone, and what is found in it.

    Raises:
        ArchitectureError: none of them does, or what it does cannot be followed; of the first it is said why.
    """
    candidates = [base, model]
    with suppress(AttributeError, NotImplementedError):
        candidates.append(model.get_decoder())
    first: LeangridError | None = None
    for entry in dict.fromkeys(candidates):
        for tokens in _TEXTS:
            try:
                return entry, discover(model, entry, partial(_run_on_text, tokens))
            except AssumptionError:
                raise
            except LeangridError as error:
                first = first or error
    raise first or ArchitectureError("it has no module that runs on text", type(model).__name__)


def _run_on_text(tokens: int, entry: nn.Module, number: int) -> Any:
    """Run ``entry`` on a few tokens, others for another ``number`` (for LONGER twice as many), none of which stands for
    a picture or a pause."""
    tokens = 2 * tokens if number == LONGER else tokens
    tables = [module.num_embeddings for module in entry.modules() if isinstance(module, nn.Embedding)]
    known = max(tables, default=16)
    ids = (torch.arange(tokens)[None] * 7 + 3 * number) % max(1, min(known, 190) - 10) + min(10, known - 1)
    return entry(**arguments_of(entry, ids))

"""Gradients through a model's own code, which may let none through."""

from collections.abc import Sequence

import torch
from torch import Tensor

from leangrid.machine.devices import is_out_of_memory


class NoGradient(Exception):
    """No gradient passes through a model's own code; the message is a sentence."""


def gradients(total: Tensor, by: Sequence[Tensor], keep: bool = False) -> tuple[Tensor, ...]:
    """The gradients of ``total`` by each tensor of ``by``, zeros where it does not depend on one.

    Args:
        keep: the graph, for another time.

    Raises:
        NoGradient: code of the model lets none through.
        RuntimeError: out of memory.
    """
    try:
        return torch.autograd.grad(total, by, retain_graph=keep, materialize_grads=True)
    except RuntimeError as failure:
        if is_out_of_memory(failure):
            raise
        raise NoGradient(why_none(failure)) from None


def why_none(failure: RuntimeError) -> str:
    """What torch said of a gradient that it could not take, as a sentence."""
    why = (str(failure).strip().splitlines() or ["torch does not say why"])[0].rstrip(".")
    return f"no gradient passes through the model's own code: {why}"

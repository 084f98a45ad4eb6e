"""What guides block tuning beside a block's own output (``guide`` of the recipe): which changes of that output the
model's predictions feel (metrics/fisher.py)."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from leangrid.metrics.fisher import felt_change


class Guide:
    """The gradients that were drawn at the outputs of the blocks that are left.

    Args:
        drawn: block -> of all windows of this rank [windows, draws, length, hidden], where they wait; for a flow that
            does not wait, whose states may have other shapes, [draws, *states] of each batch.
        get: gives a tensor that waited on a device.
    """

    def __init__(
        self, drawn: Mapping[int, Tensor | Sequence[Tensor]], get: Callable[[Tensor, torch.device], Tensor]
    ) -> None:
        self._drawn, self._get = dict(drawn), get

    def felt(self, block: int, batch: int, first: int, change: Tensor) -> Tensor:
        """How much the predictions feel a ``change`` of the states that leave ``block``, of a batch of this rank, whose
        windows begin with number ``first``."""
        drawn = self._drawn[block]
        if not isinstance(drawn, Tensor):
            return felt_change(change, self._get(drawn[batch], change.device))
        of_windows = self._get(drawn[first : first + len(change)], change.device)
        return felt_change(change, of_windows.transpose(0, 1))

    def drop(self, block: int) -> None:
        """Free what was drawn for a block that is done."""
        self._drawn.pop(block, None)

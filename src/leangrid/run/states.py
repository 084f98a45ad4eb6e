"""Where hidden states wait between their turns: on the device, in host memory, or in mapped files."""

import torch
from torch import Tensor

from leangrid.machine.devices import copy_to_host
from leangrid.planning.placement import Placement
from leangrid.storage.mapped import MappedTensors


class StatePlaces:
    """Puts hidden states where ``placement`` says, and gets them back.

    Attributes:
        placement: the present one. Run replaces it by a smaller one where memory runs out (less_memory.py).
    """

    def __init__(self, placement: Placement, device: str, mapped: MappedTensors) -> None:
        self.placement = placement
        self._device, self._mapped = device, mapped

    @property
    def block_device(self) -> torch.device:
        """Where blocks are computed."""
        return torch.device("cpu" if self.placement.host_block else self._device)

    def put(self, hidden: Tensor) -> Tensor:
        """A batch of hidden states [windows, length, hidden] that leaves a block, where it waits."""
        if self.placement.disk_streams:
            return self._mapped.store(hidden)
        return copy_to_host(hidden) if self.placement.host_streams else hidden.to(self._device)

    def get(self, hidden: Tensor, device: torch.device) -> Tensor:
        """A batch that waited, on ``device``."""
        if self.placement.disk_streams:
            return self._mapped.load_copy(hidden, device)
        return hidden.to(device, non_blocking=True)

    def algebra_device(self, group: int) -> torch.device:
        """Where the Hessian of the block's group number ``group`` is summed, factored and solved."""
        return torch.device("cpu" if group in self.placement.host_groups else self._device)

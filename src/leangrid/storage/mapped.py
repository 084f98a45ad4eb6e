"""Tensors in memory-mapped files, for hidden states that do not fit in memory.

The system's page cache keeps as much of them in memory as it has room for."""

import mmap
from pathlib import Path
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from leangrid.storage import files


class MappedTensors:
    """Stores tensors in files without a name in ``directory``; nothing is left of them when the process ends.

    The system can take mapped pages back, but they count as resident memory of the process, so they are released
    (MADV_DONTNEED) after each use."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        # By address. A tensor keeps its own mapping alive, so an entry goes with the last tensor that uses it.
        self._areas: WeakValueDictionary[int, mmap.mmap] = WeakValueDictionary()

    def store(self, tensor: Tensor) -> Tensor:
        """Copy ``tensor`` to a file; return it as a CPU tensor of the same shape and dtype.

        A tensor that is stored already is returned itself. Raises OutputError (exit code 3) if the disk is full."""
        if self._area(tensor) is not None:
            return tensor
        area = files.map_scratch_file(self._directory, tensor.nbytes)
        there = torch.frombuffer(area, dtype=tensor.dtype).view(tensor.shape)
        there.copy_(tensor)
        self._areas[there.untyped_storage().data_ptr()] = area
        area.madvise(mmap.MADV_DONTNEED)
        return there

    def load_copy(self, tensor: Tensor, device: torch.device) -> Tensor:
        """A copy, in the memory of ``device``, of a stored tensor or of a view of one."""
        copy, area = tensor.to(device, copy=True), self._area(tensor)
        if area is not None:
            area.madvise(mmap.MADV_DONTNEED)
        return copy

    def _area(self, tensor: Tensor) -> mmap.mmap | None:
        return self._areas.get(tensor.untyped_storage().data_ptr()) if tensor.device.type == "cpu" else None

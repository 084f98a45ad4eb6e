"""Tensors in mapped files: what does not fit in memory waits on disk, and the system's page cache decides how much of
it stays near."""

import mmap
from pathlib import Path
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from leangrid.storage import files


class MappedTensors:
    """Keeps tensors in files of ``directory`` that have no name: nothing is left behind, however the process ends.

    A mapped page that is in memory is the system's to take back, but it counts as resident; so pages are let go after
    each use."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._areas: WeakValueDictionary[int, mmap.mmap] = (
            WeakValueDictionary()
        )  # by address; a tensor holds on to its own

    def keep(self, tensor: Tensor) -> Tensor:
        """The same numbers in a file, as a CPU tensor; ``tensor`` itself if it lies in one already.

        Raises OutputError (exit code 3) where the disk is full.
        """
        if self._area(tensor) is not None:
            return tensor
        area = files.scratch(self._directory, tensor.nbytes)
        there = torch.frombuffer(area, dtype=tensor.dtype).view(tensor.shape)
        there.copy_(tensor)
        self._areas[there.untyped_storage().data_ptr()] = area
        area.madvise(mmap.MADV_DONTNEED)
        return there

    def take(self, tensor: Tensor, device: torch.device) -> Tensor:
        """A copy of a kept tensor, or of a part of one, in the memory of ``device``."""
        copy, area = tensor.to(device, copy=True), self._area(tensor)
        if area is not None:
            area.madvise(mmap.MADV_DONTNEED)
        return copy

    def _area(self, tensor: Tensor) -> mmap.mmap | None:
        return self._areas.get(tensor.untyped_storage().data_ptr()) if tensor.device.type == "cpu" else None

"""Reads the next block's weights while the present one is quantized, so that no device waits for a disk."""

from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from leangrid.machine.devices import has_own_memory, is_out_of_memory
from leangrid.models.skeleton import Skeleton


class Prefetch:
    """Reads one block at a time in a thread: into pinned host memory, and from there to the device on a CUDA stream of
    its own.

    Args:
        skeleton: whose blocks are read; its reads are locked, so several threads may read.
        device: where the weights will be needed; on the CPU nothing is pinned or copied.
        to_device: False leaves the weights in host memory, for a device that has no room for two blocks.
    """

    def __init__(self, skeleton: Skeleton, device: torch.device | str, to_device: bool = True) -> None:
        self.to_device = to_device
        self._skeleton, self._device = skeleton, torch.device(device)
        self._pool = ThreadPoolExecutor(1, "leangrid-prefetch")
        self._pending: tuple[int, Future[dict[str, Tensor]]] | None = None
        self._stream = torch.cuda.Stream(self._device) if has_own_memory(self._device) else None

    def begin(self, index: int) -> None:
        """Start to read block ``index``, and forget another one. Does nothing where there is no such block, or where it
        is being read already."""
        if index < len(self._skeleton.blocks) and (self._pending is None or self._pending[0] != index):
            self.drop()
            self._pending = (index, self._pool.submit(self._read, index))

    def weights_of(self, index: int) -> dict[str, Tensor] | None:
        """Wait for the weights of block ``index`` (see ``Skeleton.read_block``) and return them; None where ``begin``
        was not called for it. Raises the error that reading raised."""
        if self._pending is None or self._pending[0] != index:
            return None
        (_, future), self._pending = self._pending, None
        weights = future.result()
        if self._stream is not None:  # the allocator must not reuse their memory while the main stream reads them
            for weight in weights.values():
                if weight.device.type == "cuda":
                    weight.record_stream(torch.cuda.current_stream(self._device))
        return weights

    def drop(self) -> None:
        """Forget the block that was begun; an error of reading it is forgotten too."""
        coming, self._pending = self._pending, None
        if coming is not None and not coming[1].cancel():
            coming[1].exception()  # waits for the end; the next read of the block raises such an error again

    def close(self) -> None:
        """Forget the block that was begun, and end the thread."""
        self.drop()
        self._pool.shutdown()

    def _read(self, index: int) -> dict[str, Tensor]:
        weights = self._skeleton.read_block(index)
        if self._stream is None:
            return weights
        weights = {name: weight.pin_memory() for name, weight in weights.items()}
        if not self.to_device:
            return weights
        try:
            with torch.cuda.stream(self._stream):
                there = {name: weight.to(self._device, non_blocking=True) for name, weight in weights.items()}
            self._stream.synchronize()
            return there
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return weights  # no room beside the present block: they are copied when it is released

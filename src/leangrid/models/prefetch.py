"""The next block's weights, read while this one is solved, so that no device waits for a disk."""

from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from leangrid.machine.devices import accelerated, out_of_memory
from leangrid.models.skeleton import Skeleton


class Ahead:
    """Reads one block in a thread of its own: into pinned host memory, and from there to the device on a stream of its
    own.

    Args:
        skeleton: whose blocks; its reads are locked.
        device: where the weights will be needed; on the CPU nothing is pinned or copied.
        whole_way: False leaves the weights in host memory, where the device has no room for two blocks.
    """

    def __init__(self, skeleton: Skeleton, device: torch.device | str, whole_way: bool = True) -> None:
        self.whole_way = whole_way
        self._skeleton, self._device = skeleton, torch.device(device)
        self._pool = ThreadPoolExecutor(1, "leangrid-ahead")
        self._coming: tuple[int, Future[dict[str, Tensor]]] | None = None
        self._stream = torch.cuda.Stream(self._device) if accelerated(self._device) else None

    def start(self, index: int) -> None:
        """Begin with block ``index``; nothing where there is none, or it is under way."""
        if index < len(self._skeleton.blocks) and (self._coming is None or self._coming[0] != index):
            self.drop()
            self._coming = (index, self._pool.submit(self._read, index))

    def take(self, index: int) -> dict[str, Tensor] | None:
        """The weights of block ``index``, or None if it was not begun. Raises what reading it raised."""
        if self._coming is None or self._coming[0] != index:
            return None
        (_, future), self._coming = self._coming, None
        weights = future.result()
        if self._stream is not None:  # the allocator must not hand them out again while this stream still reads them
            for weight in weights.values():
                if weight.device.type == "cuda":
                    weight.record_stream(torch.cuda.current_stream(self._device))
        return weights

    def drop(self) -> None:
        """Forget what was read ahead."""
        coming, self._coming = self._coming, None
        if coming is not None and not coming[1].cancel():
            coming[1].exception()  # whoever asks for the block again meets the error again

    def close(self) -> None:
        """End the thread."""
        self.drop()
        self._pool.shutdown()

    def _read(self, index: int) -> dict[str, Tensor]:
        weights = self._skeleton.block_weights(index)
        if self._stream is None:
            return weights
        weights = {name: weight.pin_memory() for name, weight in weights.items()}
        if not self.whole_way:
            return weights
        try:
            with torch.cuda.stream(self._stream):
                there = {name: weight.to(self._device, non_blocking=True) for name, weight in weights.items()}
            self._stream.synchronize()
            return there
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            return weights  # no room yet: copied when this block has gone

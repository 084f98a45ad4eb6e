"""The hidden states of all calibration windows on their way through the model.

Two streams (ALGORITHM, the inputs' own error): ``quantized`` went through the already quantized model, ``original``
through the source. They may wait in host memory, or in mapped files, while the block is on another device."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass
class Streams:
    """Hidden states that enter a block: one tensor [windows, length, hidden] a batch. ``original`` is None with one
    stream."""

    quantized: list[Tensor]
    original: list[Tensor] | None

    def tensors(self) -> dict[str, Tensor]:
        """As named tensors, for the state file."""
        named = {f"quantized.{i}": x for i, x in enumerate(self.quantized)}
        return named | {f"original.{i}": x for i, x in enumerate(self.original or [])}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "Streams":
        """The inverse of ``tensors``."""
        pick = {
            kind: [tensors[n] for n in sorted((n for n in tensors if n.startswith(kind)), key=_number)]
            for kind in ("quantized", "original")
        }
        return cls(pick["quantized"], pick["original"] or None)

    def move(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every batch by ``change`` of it, one after another; batches that both streams share stay shared."""
        for index, hidden in enumerate(self.quantized):
            shared = self.original is not None and self.original[index] is hidden
            self.quantized[index] = change(hidden)
            if self.original is not None:
                self.original[index] = self.quantized[index] if shared else change(self.original[index])

    def rebatch(self, windows: int, edge: int = 0) -> None:
        """Cut batches of more than ``windows`` windows, and the one that has windows before and after window number
        ``edge`` (0: none)."""
        shared = self.original is not None and all(a is b for a, b in zip(self.quantized, self.original, strict=True))
        self.quantized[:] = _cut(self.quantized, windows, edge)
        if self.original is not None:
            self.original[:] = self.quantized if shared else _cut(self.original, windows, edge)


def cut_sizes(count: int, windows: int, edge: int = 0) -> list[int]:
    """The sizes of batches of at most ``windows`` windows, ``count`` in all, none of which has windows before and
    after window number ``edge``; all as large as they may be, in order."""
    whole = [edge, count - edge] if 0 < edge < count else [count]
    return [min(windows, part - start) for part in whole for start in range(0, part, windows)]


def _cut(batches: list[Tensor], windows: int, edge: int) -> list[Tensor]:
    """Parts of the batches, each on one side of ``edge`` and of at most ``windows`` windows."""
    parts: list[Tensor] = []
    start = 0
    for batch in batches:
        parts += batch.split(cut_sizes(len(batch), windows, edge - start))
        start += len(batch)
    return parts


def _number(name: str) -> int:
    return int(name.rpartition(".")[2])

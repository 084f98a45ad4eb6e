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

    def rebatch(self, windows: int) -> None:
        """Cut batches of more than ``windows`` windows."""
        shared = self.original is not None and all(a is b for a, b in zip(self.quantized, self.original, strict=True))
        self.quantized[:] = [part for x in self.quantized for part in x.split(windows)]
        if self.original is not None:
            self.original[:] = self.quantized if shared else [part for x in self.original for part in x.split(windows)]


def _number(name: str) -> int:
    return int(name.rpartition(".")[2])

"""The hidden states of all calibration windows on their way through the model, and how they enter its first block.

Two streams (ALGORITHM, the inputs' own error): ``quantized`` went through the already quantized model, ``original``
through the source. They may wait in host memory, or in mapped files, while the block is on another device."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from leangrid.models.skeleton import Skeleton


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


@dataclass
class Calls:
    """The other arguments with which the model calls each block (masks, rotary tables), by batch size."""

    by_batch: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]] = field(default_factory=dict)

    def of(self, index: int, windows: int, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of block ``index`` for a batch of ``windows`` windows, on ``device``."""
        return _moved(self.by_batch[windows][index], device)


def _moved(value: Any, device: torch.device) -> Any:
    """The same nest of tuples, lists and dicts with its tensors on ``device``."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    return type(value)(_moved(item, device) for item in value) if type(value) in (tuple, list) else value


def hidden_of(output: Any) -> Tensor:
    """The hidden states that a block returned, which some architectures put first in a tuple."""
    return output[0] if isinstance(output, tuple) else output


class _Captured(Exception):
    """The forward pass went as far as it was needed."""


def run_to_first_block(
    skeleton: Skeleton,
    batches: Sequence[Tensor],
    device: torch.device | str = "cpu",
    put: Callable[[Tensor], Tensor] = lambda hidden: hidden,
) -> tuple[list[Tensor], Calls]:
    """Run everything before the first block.

    Args:
        batches: token ids, int64 [windows, length] each.
        put: is given each batch's hidden states and returns what to hold of them, such as a copy in host memory.

    Returns:
        the hidden states entering block 0, one tensor a batch, and the arguments of every block.
    """
    hidden: list[Tensor] = []
    calls = Calls()
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    last = len(skeleton.blocks) - 1

    def record(index: int, want_all: bool, states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if index == 0:
            hidden.append(put(states))
        arguments.append((args, kwargs))
        if index == last or not want_all:
            raise _Captured
        return states

    with skeleton.load_outside_blocks(device) as base:
        for ids in batches:
            new_size = ids.shape[0] not in calls.by_batch
            arguments = []
            for index, block in enumerate(skeleton.blocks):
                block.forward = _bind(record, index, new_size)
            try:
                base(input_ids=ids.to(device), use_cache=False)
            except _Captured:
                pass  # the only way out of a recorded pass
            finally:
                for block in skeleton.blocks:
                    del block.forward
            if new_size:
                calls.by_batch[ids.shape[0]] = arguments
    return hidden, calls


def _bind(record: Any, index: int, want_all: bool) -> Any:
    return lambda *args, **kwargs: record(index, want_all, *args, **kwargs)

"""The walk through the blocks: every batch's forward pass runs once and pauses at each group of linears.

A block's forward is not rewritten for each architecture and not run again for each group. Each batch runs as a greenlet
(a cooperative thread): just before the first linear of a group would multiply, it stops and hands out that linear's input.
When all batches stand there, the group is quantized; then each pass goes on, the original stream with the original
weights, the quantized stream with the new ones. So every linear's product is computed once per token and stream, and
only one group's inputs are alive at a time.

Two streams (ALGORITHM section 7): ``quantized`` went through the already quantized model, ``original`` through the source.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from leangrid.errors import ArchitectureError, CalibrationError
from leangrid.models.architectures import Groups
from leangrid.models.skeleton import Skeleton


@dataclass
class Streams:
    """Hidden states that enter a block: one tensor [windows, length, hidden] a batch. ``original`` is None with one stream."""

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


def _number(name: str) -> int:
    return int(name.rpartition(".")[2])


@dataclass
class Calls:
    """The other arguments with which the model calls each block (masks, rotary tables), by batch size."""

    by_batch: dict[int, list[tuple[tuple[Any, ...], dict[str, Any]]]] = field(default_factory=dict)

    def of(self, index: int, hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of block ``index`` for a batch like ``hidden``."""
        return self.by_batch[hidden.shape[0]][index]


class _Captured(Exception):
    """The forward pass went as far as it was needed."""


def embed(skeleton: Skeleton, batches: Sequence[Tensor], device: torch.device | str = "cpu") -> tuple[list[Tensor], Calls]:
    """Run everything before the first block.

    Args:
        batches: token ids, int64 [windows, length] each.

    Returns:
        the hidden states entering block 0, one tensor a batch, and the arguments of every block.
    """
    hidden: list[Tensor] = []
    calls = Calls()
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    last = len(skeleton.blocks) - 1

    def record(index: int, want_all: bool, states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if index == 0:
            hidden.append(states)
        arguments.append((args, kwargs))
        if index == last or not want_all:
            raise _Captured
        return states

    with skeleton.without_blocks(device) as base:
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


class _Pass(greenlet):
    """One batch's forward pass, and the group at which it stands."""

    group: int = -1
    input: Tensor | None = None


@dataclass
class GroupInputs:
    """What the linears of one group read. Lists hold one tensor [windows, length, cols] a batch."""

    names: tuple[str, ...]
    quantized: list[Tensor]
    original: list[Tensor] | None

    def release(self) -> None:
        """Let go of the tensors."""
        self.quantized.clear()
        self.original = None


class BlockWalk:
    """Walks both streams through one block.

    Iterating yields a GroupInputs for each group, in order; call ``replace`` for each of its linears before the next
    step. Afterwards ``finished`` gives the streams that enter the next block.

    Raises:
        CalibrationError: a group saw no tokens (its linears were never called).
        ArchitectureError: the linears of a group read different inputs, or out of order: the table's row is wrong.
    """

    def __init__(self, block: nn.Module, groups: Groups, calls: Calls, index: int, streams: Streams) -> None:
        self._block, self._groups, self._calls, self._index, self._streams = block, groups, calls, index, streams
        self._replacements: dict[str, Tensor] = {}
        self._outputs: Streams | None = None

    def replace(self, name: str, weight: Tensor) -> None:
        """Let the quantized stream go on with ``weight`` [rows, cols as the module stores it] in the linear ``name``."""
        self._replacements[name] = weight

    def finished(self) -> Streams:
        """The streams that leave the block, once every group was walked."""
        if self._outputs is None:
            raise RuntimeError("the walk has not reached the end of its block")
        return self._outputs

    def __iter__(self) -> Iterator[GroupInputs]:
        hooks = [
            self._block.get_submodule(name).register_forward_pre_hook(_pause_at(group, name))
            for group, names in enumerate(self._groups)
            for name in names
        ]
        try:
            yield from self._walk()
        finally:
            for hook in hooks:
                hook.remove()

    def _walk(self) -> Iterator[GroupInputs]:
        quantized = [self._start(x) for x in self._streams.quantized]
        original = [self._start(x) for x in self._streams.original] if self._streams.original is not None else None
        inputs = self._resume(quantized, 0)
        originals = self._resume(original, 0) if original is not None else None
        for group, names in enumerate(self._groups):
            held = GroupInputs(names, inputs, originals)
            yield held
            held.release()  # the caller's loop variable must not keep this group alive while the next one grows
            del inputs, originals, held
            originals = self._resume(original, group + 1) if original is not None else None
            for name, weight in self._replacements.items():
                self._block.get_submodule(name).weight.data = weight
            self._replacements.clear()
            inputs = self._resume(quantized, group + 1)
        self._outputs = Streams(inputs, originals)

    def _start(self, hidden: Tensor) -> _Pass:
        args, kwargs = self._calls.of(self._index, hidden)

        def forward() -> Tensor:
            result = self._block(hidden, *args, **kwargs)
            return result[0] if isinstance(result, tuple) else result

        return _Pass(forward)

    def _resume(self, passes: list[_Pass], group: int) -> list[Tensor]:
        """Let each pass run to ``group`` (or to its end, one past the last group); return what it holds there."""
        reached = [p.switch() for p in passes]
        at_end = group == len(self._groups)
        for p in passes:
            if at_end and not p.dead:
                raise ArchitectureError(
                    f"a linear of group {p.group} was called out of order", f"block {self._index}", "Fix the architecture's row"
                )
            if not at_end and (p.dead or p.group != group):
                raise CalibrationError(
                    f"{', '.join(self._groups[group])} saw no tokens",
                    f"block {self._index}",
                    "The architecture's row does not fit this model",
                )
        return reached


def _pause_at(group: int, name: str) -> Any:
    """A forward pre-hook: the first linear of ``group`` that is called stops its pass; the others must read the same input."""

    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        current = getcurrent()
        if not isinstance(current, _Pass):
            return
        if current.group == group:
            same = current.input is not None and args[0].data_ptr() == current.input.data_ptr() and args[0].shape == current.input.shape
            if not same:
                raise ArchitectureError(f"{name} does not read the same input as its group", f"group {group}", "Fix the architecture's row")
            return
        current.group, current.input = group, args[0]
        current.parent.switch(args[0])  # pyright: ignore[reportOptionalMemberAccess]  # a running pass has a parent

    return hook

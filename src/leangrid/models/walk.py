"""The walk through one block: what the linears of each group read, in both streams.

A block's forward is not rewritten for each architecture. Each batch runs it as a greenlet (a cooperative thread): just
before the first linear of a group would multiply, the pass stops and hands out that linear's input.

            q, k, v            o                gate, up          down
    batch 0 ──●────────────────●────────────────●─────────────────●────────────> leaves the block
    batch 1 ──●────────────────●────────────────●─────────────────●────────────> leaves the block
              │ all batches stop here; their inputs are summed into H, q, k and v are quantized;
              │ then each pass goes on: the original stream with the original weights,
              │ the quantized stream with the new ones

There are two ways, which give the same bits:

* Pausing, as above. Every product is computed once for a token and stream; what all batches hold at a group is in
  memory together.
* Replaying: for each group every batch runs from the block's input to that group and is dropped. About 2.6 forward
  passes instead of one; the activations of one batch are in memory, and the replaced weights beside the original ones.

A group whose linears are called more than once in a pass, on other inputs, is summed over all its calls: for that every
batch runs through the block once more.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice, zip_longest
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn

from leangrid.errors import ArchitectureError, CalibrationError
from leangrid.machine.devices import copy_to_host
from leangrid.machine.flops import product
from leangrid.models import experts
from leangrid.models.contexts import entered_since, settings
from leangrid.models.discovery import FoundBlock
from leangrid.models.flow import Flow
from leangrid.models.groups import ExpertInputs, GroupInputs
from leangrid.models.streams import Streams

_FOLLOWS_TEXT = "depends on the text, which leangrid cannot follow: name it with --ignore"


class _Pass(greenlet):
    """One batch's forward pass, and the group at which it stands."""

    group: int = -1
    input: Any = None  # a tensor, or a list of one an expert
    gathers: int = -1  # the group at each of whose calls it stops, and nowhere else


class BlockWalk:
    """Walks both streams through one block.

    Iterating yields a GroupInputs (ExpertInputs where experts are routed to) for each group, in order. Read it before
    ``replace`` is called for each of its linears, and both before the next step. Afterwards ``finished`` gives the
    streams that enter the next block.

    Args:
        found: its groups of linears by shared input.
        flow: calls the block as the model does.
        index: its number.
        replay: run each batch to each group again, instead of pausing it there.
        park: new weights wait in host memory between groups (with ``replay`` only).
        get: gives a batch of hidden states, which may wait elsewhere, on the block's device.
        put: takes a batch that leaves the block and returns what to hold of it.
        held_out: how many batches, the last ones, go along without being shown in any group's inputs.

    Raises:
        CalibrationError: a group saw no tokens (its linears were never called).
        ArchitectureError: the linears of a group read different inputs, or out of order: the model does not do on these
            texts what it did when it was looked at (discovery.py).
    """

    def __init__(
        self,
        block: nn.Module,
        found: FoundBlock,
        flow: Flow,
        index: int,
        streams: Streams,
        replay: bool = False,
        park: bool = False,
        get: Callable[[Tensor, torch.device], Tensor] = Tensor.to,
        put: Callable[[Tensor], Tensor] = lambda hidden: hidden,
        held_out: int = 0,
    ) -> None:
        self._shown = len(streams.quantized) - held_out
        self._block, self._groups, self._index, self._streams = block, found.groups, index, streams
        self._repeated, self._flow, self._path = found.repeated, flow, found.path
        self._settings = settings()
        self._device = next(block.parameters()).device
        self._replay, self._park = replay, replay and park
        if not flow.waits:  # it gets and puts its states itself
            get, put = (lambda hidden, _device: hidden), _same_states
        self._get, self._put = get, put
        self._replacements: dict[str, Tensor] = {}
        self._originals: dict[str, Tensor] = {}  # what was replaced, where a later call of the original stream needs it
        self._new: dict[str, Tensor] = {}  # by what
        self._outputs: Streams | None = None
        self.flops = 0.0  # of the groups' linears, as they were called

    def replace(self, name: str, weight: Tensor) -> None:
        """Let the quantized stream go on with ``weight`` [rows, cols as the module stores it] in the linear
        ``name``."""
        self._replacements[name] = copy_to_host(weight) if self._park else weight

    def finished(self) -> Streams:
        """The streams that leave the block, once every group was walked."""
        if self._outputs is None:
            raise RuntimeError("the walk has not reached the end of its block")
        return self._outputs

    def __iter__(self) -> Iterator[GroupInputs | ExpertInputs]:
        with self._stopping():
            yield from self._replayed() if self._replay else self._paused()

    def gather(
        self, group: int, originals: Mapping[str, Tensor], new: Mapping[str, Tensor]
    ) -> Iterator[tuple[int, Any, Any]]:
        """What ``group`` reads, with the number of the batch, while every batch runs through the whole block, the
        original stream with the weights ``originals``, the other with ``new``; afterwards the block has the originals,
        and the flow may go on."""
        self._originals, self._new = dict(originals), dict(new)
        with self._stopping():
            yield from self._all_calls(group, self._shown, trial=False)
        self._set(self._originals)

    @contextmanager
    def _stopping(self) -> Iterator[None]:
        """Context: passes through the block stop at its groups."""
        mixtures = [experts.experts_of_group(self._block, names) for names in self._groups]
        hooks = [
            self._block.get_submodule(name).register_forward_pre_hook(self._pause_at(group, name), with_kwargs=True)
            for group, names in enumerate(self._groups)
            if mixtures[group] is None
            for name in names
        ]
        for first, mixture in enumerate(mixtures):
            if mixture is not None and mixture[2] == 0:
                mixture[1].before_stage = self._pause_experts(first)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for mixture in mixtures:
                if mixture is not None:
                    mixture[1].before_stage = None

    def inputs(
        self, group: int, paired: bool, read: Callable[[], Iterator[tuple[int, Any, Any]]]
    ) -> GroupInputs | ExpertInputs:
        """The inputs of ``group``, which ``read`` gives batch by batch."""
        mixture = experts.experts_of_group(self._block, self._groups[group])
        if mixture is None:
            return GroupInputs(self._groups[group], paired, read)
        path, module, stage = mixture
        each = tuple(tuple(f"{path}.{name}" for name in names) for names in module.stage(stage))
        return ExpertInputs(self._groups[group], each, read)

    def _paused(self) -> Iterator[GroupInputs | ExpertInputs]:
        quantized = [self._start("quantized", i, x) for i, x in enumerate(self._streams.quantized)]
        original = None
        if self._streams.original is not None:
            original = [self._start("original", i, x) for i, x in enumerate(self._streams.original)]
        try:
            reached = self._together(original, quantized, 0)
            for group in range(len(self._groups)):
                if group in self._repeated:
                    reached.clear()
                    yield self.inputs(
                        group, original is not None, lambda group=group: self._all_calls(group, self._shown)
                    )
                else:
                    yield self.inputs(group, original is not None, lambda held=reached: islice(held, self._shown))
                reached.clear()  # whoever still holds the group must not keep its inputs alive while the next one grows
                reached = self._together(original, quantized, group + 1)
        finally:
            for one in [*quantized, *(original or [])]:
                _end(one)
        self._outputs = Streams(
            [q for *_, q in reached], None if original is None else [o for _, o, _ in reached if o is not None]
        )

    def _together(self, original: list[_Pass] | None, quantized: list[_Pass], group: int) -> list[tuple[int, Any, Any]]:
        """Let the original stream run to ``group`` with the weights that are there, then the other one with the new
        ones."""
        self._set(self._originals)
        originals = [None] * len(quantized) if original is None else [self._resume(p, group) for p in original]
        if self._repeated:  # an earlier group is called again: each stream needs its own weights then
            for name, weight in self._replacements.items():
                self._originals[name] = self._block.get_parameter(f"{name}.weight").data
                self._new[name] = weight
            self._set(self._new)
        else:
            self._set(self._replacements)
        self._replacements.clear()
        ours = [self._resume(p, group) for p in quantized]
        return list(zip(range(len(ours)), originals, ours, strict=True))

    def _all_calls(self, group: int, batches: int, trial: bool = True) -> Iterator[tuple[int, Any, Any]]:
        """What ``group`` reads in each of its calls: the first ``batches`` run through the whole block for it."""
        new, before = dict(self._new), dict(self._originals)
        if self._replay:
            before = {name: self._block.get_parameter(f"{name}.weight").data for name in self._replacements}
            new = {name: weight.to(self._device) for name, weight in self._replacements.items()}
        for batch, hidden in enumerate(self._streams.quantized[:batches]):
            ours = self._calls_of(group, self._start("quantized", batch, hidden, trial), new)
            if self._streams.original is None:
                yield from ((batch, None, x) for x in ours)
                continue
            theirs = self._start("original", batch, self._streams.original[batch], trial)
            for pair in zip_longest(self._calls_of(group, theirs, before), ours):
                if pair[0] is None or pair[1] is None:
                    what = f"{self._groups[group][0]} is called more often in one stream than in the other"
                    raise ArchitectureError(what, self._path, f"How often {_FOLLOWS_TEXT}")
                yield batch, *pair
        self._set(before if self._replay else new)

    def _calls_of(self, group: int, one: _Pass, weights: Mapping[str, Any]) -> Iterator[Any]:
        """What ``group`` reads in each of its calls in a pass with ``weights``, which stops there: what is read may be
        changed in place afterwards."""
        one.gathers = group
        try:
            while True:
                self._set(weights)
                found = one.switch()
                if one.dead:
                    return
                yield found
        finally:
            _end(one)

    def _replayed(self) -> Iterator[GroupInputs | ExpertInputs]:
        paired = self._streams.original is not None
        for group in range(len(self._groups)):
            read = self._all_calls if group in self._repeated else self._pairs
            yield self.inputs(group, paired, lambda group=group, read=read: read(group, self._shown))
            if not paired:  # no stream needs the original weights any more
                self._set({name: weight.to(self._device) for name, weight in self._replacements.items()})
                self._replacements.clear()
        quantized: list[Tensor] = []
        original: list[Tensor] = []
        for _, theirs, ours in self._pairs(len(self._groups), len(self._streams.quantized)):
            quantized.append(ours)
            original += [] if theirs is None else [theirs]
        self._outputs = Streams(quantized, original if paired else None)

    def _pairs(self, group: int, batches: int) -> Iterator[tuple[int, Any, Any]]:
        """Run one of the first ``batches`` after the other from the block's input to ``group``."""
        before = {name: self._block.get_submodule(name).weight.data for name in self._replacements}
        new = {name: weight.to(self._device, non_blocking=True) for name, weight in self._replacements.items()}
        try:
            for index, hidden in enumerate(self._streams.quantized[:batches]):
                theirs = None
                if self._streams.original is not None:
                    theirs = self._once("original", index, self._streams.original[index], group, before)
                yield index, theirs, self._once("quantized", index, hidden, group, new)
                del theirs
        finally:
            self._set(before)

    def _once(self, stream: str, batch: int, hidden: Tensor, group: int, weights: Mapping[str, Any]) -> Any:
        """What a fresh pass with ``weights`` holds at ``group``; its other activations are gone when this returns."""
        self._set(weights)
        once = self._start(stream, batch, hidden, trial=group < len(self._groups))
        try:
            for earlier in range(group):
                self._resume(once, earlier)
            return self._resume(once, group)
        finally:
            _end(once)

    def _set(self, weights: Mapping[str, Any]) -> None:
        for name, weight in weights.items():
            self._block.get_submodule(name).weight.data = weight

    def _start(self, stream: str, batch: int, hidden: Tensor, trial: bool = False) -> _Pass:
        """A pass that has not begun; ``hidden`` goes to the block's device only when it does. ``trial``: another one
        with the same ``hidden`` follows."""

        def forward() -> Tensor:
            entered = self._get(hidden, self._device)
            return self._put(self._flow.call(stream, batch, self._index, self._block, entered, trial))

        return _Pass(forward)

    def _resume(self, one: _Pass, group: int) -> Any:
        """Let a pass run to ``group`` (or to its end, one past the last group); return what it holds there."""
        reached = one.switch()
        at_end = group == len(self._groups)
        if one.dead:
            one.input = None
        if at_end and not one.dead:
            raise ArchitectureError(
                f"a linear of group {one.group} was called out of order",
                self._path,
                f"Its order of calls {_FOLLOWS_TEXT}",
            )
        if not at_end and (one.dead or one.group != group):
            raise CalibrationError(
                f"{', '.join(self._groups[group])} saw no tokens",
                self._path,
                "Use more or other calibration text, or name it with --ignore",
            )
        return reached

    def _stop(self, one: _Pass, x: Any) -> None:
        """Stop the running pass, which reads ``x``, where it is."""
        if (found := entered_since(self._settings)) is not None:
            what = f"a linear is called under {found}, which a pass that stops there would leave"
            raise ArchitectureError(what, self._path, "Name its linears with --ignore")
        one.parent.switch(x)  # pyright: ignore[reportOptionalMemberAccess]  # a running pass has a parent

    def _pause_experts(self, first: int) -> Callable[[int, list[Tensor]], None]:
        """What an Experts module calls before a stage: its stages are the groups ``first`` and the one after."""

        def stop(stage: int, inputs: list[Tensor]) -> None:
            current = getcurrent()
            if not isinstance(current, _Pass):
                return
            if current.gathers >= 0:
                if current.gathers == first + stage:
                    self._stop(current, inputs)
                return
            current.group, current.input = first + stage, inputs
            self._stop(current, inputs)
            mixture = experts.experts_of_group(self._block, self._groups[first + stage])
            if mixture is not None:
                for names, x in zip(mixture[1].stage(stage), inputs, strict=True):
                    shapes = [mixture[1].get_parameter(f"{name}.weight").shape for name in names]
                    self.flops += sum(product(rows, cols, len(x)) for rows, cols in shapes)
            current.input = None

        return stop

    def _pause_at(self, group: int, name: str) -> Any:
        """A forward pre-hook: the first linear of ``group`` that is called stops its pass; the others must read the
        same input."""

        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            current, x = getcurrent(), args[0] if args else next(iter(kwargs.values()))
            if not isinstance(current, _Pass):
                return
            if current.gathers >= 0:
                if current.gathers == group and name == self._groups[group][0]:
                    self._stop(current, x)
                return
            if group in self._repeated and current.group >= group:
                pass  # called again: its inputs were gathered
            elif current.group != group:
                current.group, current.input = group, x
                self._stop(current, x)
            elif current.input is None or not _same(x, current.input):
                raise ArchitectureError(
                    f"{name} does not read the same input as its group",
                    self._path,
                    f"What it reads {_FOLLOWS_TEXT}",
                )
            weight: Any = module.weight
            self.flops += product(weight.shape[0], weight.shape[1], x.numel() // x.shape[-1])

        return hook


def _same_states(hidden: Tensor) -> Tensor:
    return hidden


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two views show the same numbers, in rows of the same width."""
    return one.data_ptr() == other.data_ptr() and one.numel() == other.numel() and one.shape[-1] == other.shape[-1]


def _end(one: _Pass) -> None:
    """End a pass where it stands: its stack names itself, so nobody else would ever let its activations go."""
    if not one.dead:
        one.throw(GreenletExit)
    one.input = None

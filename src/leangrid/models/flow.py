"""How hidden states get from one block to the next: always by the model's own forward pass, stopped at its blocks.

* ChainedFlow, where hidden states are all that flows (discovery.py): the other arguments of the blocks are taken once,
  from a pass of blocks that do nothing, and each block is called alone. States may wait anywhere between two blocks.
* LiveFlow, where more flows (keys and values that later blocks share, embeddings a layer, indices of sparse attention,
  encoder states), and for rows with pictures. One pass for each batch runs through the whole model as a greenlet and
  stops whenever it calls a block. What the model keeps between its blocks stays in the pass.

A stream is one model's batches on their way, told apart by name: "quantized" and "original".
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn

from leangrid.errors import ArchitectureError
from leangrid.models.calls import copied, fill, first_tensor, hidden_argument, moved
from leangrid.models.model_inputs import Inputs, moved_inputs, token_ids
from leangrid.models.skeleton import Skeleton
from leangrid.models.streams import Streams

Put = Callable[[Tensor], Tensor]
Get = Callable[[Tensor, torch.device], Tensor]


class Flow(ABC):
    """The way through one model.

    Attributes:
        waits: whether hidden states are all that there is between two blocks, so that they may be saved.
    """

    waits: bool

    def __init__(self, skeleton: Skeleton, device: torch.device | str = "cpu") -> None:
        self._skeleton, self._device = skeleton, torch.device(device)

    @abstractmethod
    def enter(self, batches: Sequence[Inputs], put: Put, *streams: str) -> list[Tensor]:
        """Run everything before the first block.

        Args:
            batches: token ids, int64 [windows, length] each, or the processor's inputs for a row (model_inputs.py).
            put: is given each batch's hidden states and returns what to hold of them.
            streams: those that begin here.

        Returns:
            The hidden states that enter the first block, one tensor a batch; the streams share them.

        Raises:
            ArchitectureError: the model calls its blocks in another order than when it was looked at.
        """

    @abstractmethod
    def call(
        self, stream: str, batch: int, index: int, block: Callable[..., Any], hidden: Tensor, trial: bool = False
    ) -> Tensor:
        """Call ``block``, number ``index``, as the model would, with ``hidden`` as its states; what leaves it.

        ``trial``: the same call comes again, with the same arguments."""

    def advance(self, stream: str, states: list[Tensor]) -> tuple[int | None, list[Tensor]]:
        """Go on to the next block: its number where it is not simply the next (None), and the states that enter it."""
        return None, states

    def advance_both(self, streams: Streams) -> tuple[int | None, Streams]:
        """Go on to the next block in both streams; ArchitectureError where it is not the same one."""
        following, quantized = self.advance("quantized", streams.quantized)
        if streams.original is None:
            return following, Streams(quantized, None)
        theirs, original = self.advance("original", streams.original)
        if theirs != following:
            raise _other_order(self._skeleton, min(theirs or 0, following or 0))
        return following, Streams(quantized, original)

    def finals(self, stream: str) -> list[Any]:
        """What the model's own forward returned for each batch, where it ran to its end; else nothing."""
        return []

    def close(self) -> None:  # noqa: B027  # most hold nothing
        """Let everything go that is held between blocks."""


class ChainedFlow(Flow):
    """Each block alone."""

    waits = True

    def __init__(self, skeleton: Skeleton, device: torch.device | str = "cpu") -> None:
        super().__init__(skeleton, device)
        # windows of a batch -> the other arguments (masks, rotary tables) of each block
        self._calls: dict[int, list[tuple[str | int, tuple[Any, ...], dict[str, Any]]]] = {}

    def enter(self, batches: Sequence[Inputs], put: Put, *streams: str) -> list[Tensor]:
        return self._run_to_first_block(batches, put)

    def prepare(self, windows: Tensor, sizes: set[int]) -> None:
        """Take the arguments for batches of ``sizes`` windows, where they are not known."""
        for size in sizes - self._calls.keys():
            self._run_to_first_block([windows[:size]], lambda hidden: hidden)

    def call(
        self, stream: str, batch: int, index: int, block: Callable[..., Any], hidden: Tensor, trial: bool = False
    ) -> Tensor:
        key, args, kwargs = self._calls[len(hidden)][index]
        device = hidden.device
        if self._skeleton.structure.blocks[index].changes:  # both streams may share it, and it may be called again
            hidden = hidden.clone()
        args, kwargs = _with_hidden(key, moved(args, device), moved(kwargs, device), hidden)
        return first_tensor(block(*args, **kwargs))

    def _run_to_first_block(self, batches: Sequence[Inputs], put: Put) -> list[Tensor]:
        skeleton, entered = self._skeleton, list[Tensor]()
        arguments: list[tuple[str | int, tuple[Any, ...], dict[str, Any]]] = []
        last = len(skeleton.blocks) - 1

        def record(index: int, want_all: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            key, states = hidden_argument(args, kwargs)
            if states is None or index != len(arguments):
                raise _other_order(skeleton, index)
            if index == 0:
                entered.append(put(states))
            without = tuple(None if number == key else value for number, value in enumerate(args))
            arguments.append((key, without, {name: value for name, value in kwargs.items() if name != key}))
            if index == last or not want_all:
                raise _Captured
            return fill(skeleton.structure.blocks[index].returns, states)

        with skeleton.load_outside_blocks(self._device):
            for inputs in batches:
                size = len(token_ids(inputs))
                new_size = size not in self._calls
                arguments = []
                for index, block in enumerate(skeleton.blocks):
                    block.forward = _bind(record, index, new_size)
                try:
                    skeleton.run(moved_inputs(inputs, self._device, skeleton.compute_dtype))
                except _Captured:
                    pass  # the only way out of a recorded pass
                finally:
                    for block in skeleton.blocks:
                        del block.forward
                if new_size:
                    if len(arguments) <= last:
                        raise _other_order(skeleton, len(arguments))
                    self._calls[size] = arguments
        return entered


class LiveFlow(Flow):
    """The model's own forward, a pass a batch, stopped at each block. The weights outside of the blocks stay loaded.

    Between two blocks the states that entered the last one and those that left it are where ``put`` of ``enter`` puts
    them; what else the model holds stays where it is.

    Args:
        get: gives states that were put elsewhere on the device.
        beside: another flow of the same skeleton, whose weights outside of the blocks are loaded, is open.
    """

    waits = False

    def __init__(
        self, skeleton: Skeleton, device: torch.device | str = "cpu", get: Get = Tensor.to, beside: bool = False
    ) -> None:
        super().__init__(skeleton, device)
        self._beside, self._get = beside, get
        self._put: Put = _as_they_are
        self._passes: dict[str, list[_ModelPass]] = {}
        self._outside: AbstractContextManager[Any] | None = None

    def enter(self, batches: Sequence[Inputs], put: Put, *streams: str) -> list[Tensor]:
        self.close()
        self._put, skeleton = put, self._skeleton
        if not self._beside:
            self._outside = skeleton.load_outside_blocks(self._device)
            self._outside.__enter__()
            for index, block in enumerate(skeleton.blocks):
                _stop_in(block, index)
        states: list[Tensor] = []
        for stream in streams:
            passes = self._passes[stream] = [_ModelPass(_run_of(skeleton, inputs, self._device)) for inputs in batches]
            states = [self._reach(one) for one in passes]
            self._require_together(passes, skeleton.structure.order[0])
        return states

    def call(
        self, stream: str, batch: int, index: int, block: Callable[..., Any], hidden: Tensor, trial: bool = False
    ) -> Tensor:
        one = self._passes[stream][batch]
        if one.index != index:
            raise _other_order(self._skeleton, one.index)
        given = one.args, one.kwargs
        if trial:  # the pass goes on from another call, which has to be given what this one was given
            hidden = self._get(hidden, self._device)
            if self._skeleton.structure.blocks[index].changes:
                hidden, given = hidden.clone(), copied(given)
            return first_tensor(_called(block, one.key, given, hidden))
        one.fetch(hidden, self._get, self._device)
        one.returned = _called(block, one.key, given, hidden)
        left = first_tensor(one.returned)
        one.hold(left)
        one.put_away(self._put)
        return left

    def advance(self, stream: str, states: list[Tensor]) -> tuple[int | None, list[Tensor]]:
        passes = self._passes[stream]
        entered = [self._reach(one) for one in passes]
        self._require_together(passes, passes[0].index)
        return passes[0].index, entered

    def put_away(self) -> None:
        """Put all states where ``put`` puts them by now."""
        for one in (one for passes in self._passes.values() for one in passes):
            one.put_away(self._put)

    def _reach(self, one: "_ModelPass") -> Tensor:
        """Let a pass go on to its next block; the states that enter it, put away."""
        one.fetch(None, self._get, self._device)
        entered = one.reach_block(one.returned)
        one.held.clear()
        if not one.dead:
            one.hold(entered)
            one.put_away(self._put)
        return entered

    def _require_together(self, passes: list["_ModelPass"], index: int) -> None:
        """ArchitectureError unless all batches stand at block ``index``."""
        if strayed := next((one for one in passes if one.index != index), None):
            raise _other_order(self._skeleton, min(strayed.index, index))

    def finals(self, stream: str) -> list[Any]:
        return [one.final for one in self._passes.get(stream, [])]

    def close(self) -> None:
        for one in (one for passes in self._passes.values() for one in passes):
            if not one.dead:
                one.throw(GreenletExit)
        self._passes.clear()
        if self._outside is not None:
            for block in self._skeleton.blocks:
                block.__dict__.pop("forward", None)
            self._outside.__exit__(None, None, None)
            self._outside = None


def open_flow(skeleton: Skeleton, device: torch.device | str = "cpu", get: Get = Tensor.to) -> Flow:
    """The flow for what was discovered of the model; ``get``: gives states that were put elsewhere on the device."""
    return LiveFlow(skeleton, device, get) if flows_live(skeleton) else ChainedFlow(skeleton, device)


def flows_live(skeleton: Skeleton) -> bool:
    """Whether the model's own forward is held at its blocks, since hidden states are not all that there is."""
    return bool(skeleton.structure.flows) or skeleton.sees_pictures  # rows differ in length and arguments


class _ModelPass(greenlet):
    """One batch's pass through the model, and the call of a block at which it stands.

    Attributes:
        index: the block's number; the number of blocks at the end.
        args, kwargs: what it is called with, ``key`` says as what the hidden states are.
        returned: what the block returned, for the model to go on with.
        final: what the model returned, at the end.
        held: the states that may be put away while it stands: each with what was put away of it (None: nothing is), and
            how often it had been changed then.
    """

    index: int = -1
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}  # noqa: RUF012  # replaced at each stop, never changed
    key: str | int = 0
    returned: Any = None
    final: Any = None

    def __init__(self, run: Callable[[], Any]) -> None:
        super().__init__(run)
        self.held: list[tuple[Tensor, Tensor | None, int]] = []

    def hold(self, states: Tensor) -> None:
        """Let ``states`` be put away from now on."""
        if not any(x is states for x, _, _ in self.held):
            self.held.append((states, None, 0))

    def put_away(self, put: Put) -> None:
        """Let the states have no memory but that of what ``put`` gives. The model's own code holds the same tensors."""
        for number, (x, away, version) in enumerate(self.held):
            x.data = put(x.data if away is None or x._version != version else away)
            self.held[number] = (x, x.data, x._version)

    def fetch(self, only: Tensor | None, get: Get, device: torch.device) -> None:
        """Bring the states that are held, or one of them, back to the device."""
        for x, away, _ in self.held:
            if away is not None and (only is None or x is only):
                x.data = get(away, device)

    def reach_block(self, returned: Any) -> Tensor:
        """Go on from the present block with what it ``returned``, to the next; the states that enter it (at the end an
        empty tensor)."""
        reached = self.switch() if self.index < 0 else self.switch(returned)
        self.returned = None
        if self.dead:
            self.index, self.final, self.args, self.kwargs = _END, reached, (), {}
            return torch.empty(0)
        self.index, self.args, self.kwargs = reached
        self.key, hidden = hidden_argument(self.args, self.kwargs)
        if hidden is None:
            raise RuntimeError(f"block {self.index} is called without hidden states")
        return hidden


_END = 1 << 30  # the index at which a pass stands that ran to its end


def _run_of(skeleton: Skeleton, inputs: Inputs, device: torch.device | str) -> Callable[[], Any]:
    return lambda: skeleton.run(moved_inputs(inputs, device, skeleton.compute_dtype))


def _stop_in(block: nn.Module, index: int) -> None:
    """Let a pass through the model stop where it calls ``block``; anyone else calls it as it is."""
    own = type(block).forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        current = getcurrent()
        if isinstance(current, _ModelPass) and current.parent is not None:
            return current.parent.switch((index, args, kwargs))
        return own(block, *args, **kwargs)

    block.forward = forward


def _as_they_are(hidden: Tensor) -> Tensor:
    return hidden


def _called(
    block: Callable[..., Any], key: str | int, given: tuple[tuple[Any, ...], dict[str, Any]], hidden: Tensor
) -> Any:
    args, kwargs = _with_hidden(key, *given, hidden)
    return block(*args, **kwargs)


def _other_order(skeleton: Skeleton, index: int) -> ArchitectureError:
    where = skeleton.block_name(index) if index < len(skeleton.blocks) else "the end of its blocks"
    what = "its blocks are called in another order than when it was looked at, or without hidden states"
    return ArchitectureError(what, where, "Which blocks are called depends on the text, which leangrid cannot follow")


def _with_hidden(
    key: str | int, args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(key, int):
        return (*args[:key], hidden, *args[key + 1 :]), kwargs
    return args, {**kwargs, key: hidden}


class _Captured(Exception):
    """The forward pass went as far as it was needed."""


def _bind(record: Any, index: int, want_all: bool) -> Any:
    return lambda *args, **kwargs: record(index, want_all, args, kwargs)

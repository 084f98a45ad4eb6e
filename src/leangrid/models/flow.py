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
from greenlet import GreenletExit
from torch import Tensor

from leangrid.errors import ArchitectureError
from leangrid.models.calls import copied, fill, first_tensor, hidden_argument, is_alike, moved
from leangrid.models.model_inputs import Inputs, moved_inputs, token_ids
from leangrid.models.model_pass import END, Get, ModelPass, Put, other_order, require_order, run_of, stop_in
from leangrid.models.order_check import LOOKED_AT, OrderCheck
from leangrid.models.skeleton import Skeleton
from leangrid.models.streams import Streams


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
            raise other_order(self._skeleton, following or 0, theirs or 0)
        return following, Streams(quantized, original)

    def finals(self, stream: str) -> list[Any]:
        """What the model's own forward returned for each batch, where it ran to its end; else nothing."""
        return []

    def close(self) -> None:  # noqa: B027  # most hold nothing
        """Let everything go that is held between blocks."""


class ChainedFlow(Flow):
    """Each block alone, and beside it the model's own forward, which says whether it goes on as it was seen to.

    Args:
        get: gives states that were put elsewhere on the device.
        looked_at: how many batches of each stream have the model's own forward beside them.
    """

    waits = True

    def __init__(
        self,
        skeleton: Skeleton,
        device: torch.device | str = "cpu",
        get: Get = Tensor.to,
        looked_at: int = LOOKED_AT,
    ) -> None:
        super().__init__(skeleton, device)
        # windows of a batch -> the other arguments (masks, rotary tables) of each block
        self._calls: dict[int, list[tuple[str | int, tuple[Any, ...], dict[str, Any]]]] = {}
        self._check = OrderCheck(skeleton, self._device, get, looked_at)

    def enter(self, batches: Sequence[Inputs], put: Put, *streams: str) -> list[Tensor]:
        self.close()
        with self._skeleton.load_outside_blocks(self._device):
            self._take_arguments(batches)
            return self._check.begin(batches, put, streams)

    def prepare(self, windows: Tensor, streams: Streams, index: int) -> None:
        """Be ready for ``streams``, which stand before block ``index``, where they have other batches than those that
        entered the model: take the arguments for these, and let the model's own forward come to where they are."""
        states = {"quantized": streams.quantized} | ({"original": streams.original} if streams.original else {})
        if not self._check.stands_at(index, states):
            self.close()
            batches = windows.split([len(hidden) for hidden in streams.quantized])
            with self._skeleton.load_outside_blocks(self._device):
                self._take_arguments(batches)
                self._check.resume(batches, index, states)

    def call(
        self, stream: str, batch: int, index: int, block: Callable[..., Any], hidden: Tensor, trial: bool = False
    ) -> Tensor:
        key, args, kwargs = self._calls[len(hidden)][index]
        device = hidden.device
        if self._skeleton.structure.blocks[index].changes:  # both streams may share it, and it may be called again
            hidden = hidden.clone()
        args, kwargs = _with_hidden(key, moved(args, device), moved(kwargs, device), hidden)
        return first_tensor(block(*args, **kwargs))

    def advance(self, stream: str, states: list[Tensor]) -> tuple[int | None, list[Tensor]]:
        self._check.go_on(stream, states)
        return None, states

    def close(self) -> None:
        self._check.close()

    def _take_arguments(self, batches: Sequence[Inputs]) -> None:
        """Take the blocks' other arguments for batches of new sizes; ArchitectureError where a batch is given others
        than another one of its size."""
        for inputs in batches:
            size, found = len(token_ids(inputs)), self._arguments_for(inputs)
            for index, (one, other) in enumerate(zip(self._calls.setdefault(size, found), found, strict=True)):
                if one is not other and not is_alike(one, other):
                    what = "its arguments beside the hidden states depend on the text, as they did not when the model"
                    where = self._skeleton.block_name(index)
                    raise ArchitectureError(f"{what} was looked at", where, "leangrid cannot follow that")

    def _arguments_for(self, inputs: Inputs) -> list[tuple[str | int, tuple[Any, ...], dict[str, Any]]]:
        """What a pass through blocks that do nothing gives each of them beside the hidden states."""
        skeleton, found = self._skeleton, list[tuple[str | int, tuple[Any, ...], dict[str, Any]]]()
        last = len(skeleton.blocks) - 1

        def record(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            key, states = hidden_argument(args, kwargs)
            if states is None or index != len(found):
                raise other_order(skeleton, len(found), index)
            without = tuple(None if number == key else value for number, value in enumerate(args))
            found.append((key, without, {name: value for name, value in kwargs.items() if name != key}))
            if index == last:
                raise _Captured
            return fill(skeleton.structure.blocks[index].returns, states)

        for index, block in enumerate(skeleton.blocks):
            block.forward = _bind(record, index)
        try:
            skeleton.run(moved_inputs(inputs, self._device, skeleton.compute_dtype))
        except _Captured:
            pass  # the only way out of a recorded pass
        finally:
            for block in skeleton.blocks:
                del block.forward
        if len(found) <= last:
            raise other_order(skeleton, len(found), END)
        return found


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
        self._passes: dict[str, list[ModelPass]] = {}
        self._outside: AbstractContextManager[Any] | None = None

    def enter(self, batches: Sequence[Inputs], put: Put, *streams: str) -> list[Tensor]:
        self.close()
        self._put, skeleton = put, self._skeleton
        if not self._beside:
            self._outside = skeleton.load_outside_blocks(self._device)
            self._outside.__enter__()
            for index, block in enumerate(skeleton.blocks):
                stop_in(block, index)
        states: list[Tensor] = []
        for stream in streams:
            passes = self._passes[stream] = [ModelPass(run_of(skeleton, inputs, self._device)) for inputs in batches]
            states = [self._reach(one) for one in passes]
        return states

    def call(
        self, stream: str, batch: int, index: int, block: Callable[..., Any], hidden: Tensor, trial: bool = False
    ) -> Tensor:
        one = self._passes[stream][batch]
        if one.index != index:
            raise other_order(self._skeleton, index, one.index)
        if trial:  # the pass goes on from another call, which has to be given what this one was given
            args, kwargs = _with_hidden(one.key, one.args, one.kwargs, self._get(hidden, self._device))
            if self._skeleton.structure.blocks[index].changes:
                args, kwargs = copied((args, kwargs))
            return first_tensor(block(*args, **kwargs))
        one.fetch(hidden, self._get, self._device)
        args, kwargs = _with_hidden(one.key, one.args, one.kwargs, hidden)
        one.returned = block(*args, **kwargs)
        left = first_tensor(one.returned)
        one.hold(left)
        one.put_away(self._put)
        return left

    def advance(self, stream: str, states: list[Tensor]) -> tuple[int | None, list[Tensor]]:
        passes = self._passes[stream]
        entered = [self._reach(one) for one in passes]
        return passes[0].index, entered

    def put_away(self) -> None:
        """Put all states where ``put`` puts them by now."""
        for one in (one for passes in self._passes.values() for one in passes):
            one.put_away(self._put)

    def _reach(self, one: "ModelPass") -> Tensor:
        """Let a pass go on to its next block; the states that enter it, put away. ArchitectureError where it goes on to
        another than it was seen to."""
        before = one.calls
        one.fetch(None, self._get, self._device)
        entered = one.reach_block(one.returned)
        require_order(self._skeleton, one, before)
        one.held.clear()
        if not one.dead:
            one.hold(entered)
            one.put_away(self._put)
        return entered

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
    return LiveFlow(skeleton, device, get) if flows_live(skeleton) else ChainedFlow(skeleton, device, get)


def flows_live(skeleton: Skeleton) -> bool:
    """Whether the model's own forward is held at its blocks, since hidden states are not all that there is."""
    return bool(skeleton.structure.flows) or skeleton.sees_pictures  # rows differ in length and arguments


def _as_they_are(hidden: Tensor) -> Tensor:
    return hidden


def _with_hidden(
    key: str | int, args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with ``hidden`` as argument ``key``, and as every other that is the same tensor (Funnel's blocks
    are given queries, keys and values)."""
    own = args[key] if isinstance(key, int) else kwargs.get(key)

    def given(value: Any) -> Any:
        return hidden if value is own and own is not None else value

    args, kwargs = tuple(map(given, args)), {name: given(value) for name, value in kwargs.items()}
    if isinstance(key, int):
        return (*args[:key], hidden, *args[key + 1 :]), kwargs
    return args, {**kwargs, key: hidden}


class _Captured(Exception):
    """The forward pass went as far as it was needed."""


def _bind(record: Any, index: int) -> Any:
    return lambda *args, **kwargs: record(index, args, kwargs)

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

from leangrid.models.calls import fill, first_tensor, hidden_argument, moved
from leangrid.models.model_inputs import Inputs, moved_inputs, token_ids
from leangrid.models.skeleton import Skeleton

Put = Callable[[Tensor], Tensor]


class Flow(ABC):
    """The way through one model.

    Attributes:
        waits: whether hidden states may be put elsewhere and saved between two blocks.
    """

    waits: bool

    def __init__(self, skeleton: Skeleton, device: torch.device | str = "cpu") -> None:
        self._skeleton, self._device = skeleton, device

    @abstractmethod
    def enter(self, batches: Sequence[Inputs], put: Put, *streams: str) -> list[Tensor]:
        """Run everything before the first block.

        Args:
            batches: token ids, int64 [windows, length] each, or the processor's inputs for a row (model_inputs.py).
            put: is given each batch's hidden states and returns what to hold of them.
            streams: those that begin here.

        Returns:
            The hidden states that enter the first block, one tensor a batch; the streams share them.
        """

    @abstractmethod
    def call(self, stream: str, batch: int, index: int, block: nn.Module, hidden: Tensor) -> Tensor:
        """Call ``block``, number ``index``, as the model would, with ``hidden`` as its states; what leaves it."""

    def advance(self, stream: str, states: list[Tensor]) -> tuple[int | None, list[Tensor]]:
        """Go on to the next block: its number where it is not simply the next (None), and the states that enter it."""
        return None, states

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

    def call(self, stream: str, batch: int, index: int, block: nn.Module, hidden: Tensor) -> Tensor:
        key, args, kwargs = self._calls[len(hidden)][index]
        device = hidden.device
        args, kwargs = _with_hidden(key, moved(args, device), moved(kwargs, device), hidden)
        return first_tensor(block(*args, **kwargs))

    def _run_to_first_block(self, batches: Sequence[Inputs], put: Put) -> list[Tensor]:
        skeleton, entered = self._skeleton, list[Tensor]()
        arguments: list[tuple[str | int, tuple[Any, ...], dict[str, Any]]] = []
        last = len(skeleton.blocks) - 1

        def record(index: int, want_all: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            key, states = hidden_argument(args, kwargs)
            if states is None:
                raise RuntimeError(f"block {index} is called without hidden states")
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
                    self._calls[size] = arguments
        return entered


class LiveFlow(Flow):
    """The model's own forward, a pass a batch, stopped at each block. The weights outside of the blocks stay loaded."""

    waits = False

    def __init__(self, skeleton: Skeleton, device: torch.device | str = "cpu", beside: bool = False) -> None:
        """``beside``: another flow of the same skeleton, whose weights outside of the blocks are loaded, is open."""
        super().__init__(skeleton, device)
        self._beside = beside
        self._passes: dict[str, list[_ModelPass]] = {}
        self._outside: AbstractContextManager[Any] | None = None

    def enter(self, batches: Sequence[Inputs], put: Put, *streams: str) -> list[Tensor]:
        self.close()
        skeleton = self._skeleton
        if not self._beside:
            self._outside = skeleton.load_outside_blocks(self._device)
            self._outside.__enter__()
            for index, block in enumerate(skeleton.blocks):
                _stop_in(block, index)
        states: list[Tensor] = []
        for stream in streams:
            passes = [_ModelPass(_run_of(skeleton, inputs, self._device)) for inputs in batches]
            states = [one.reach_block(None) for one in passes]
            self._passes[stream] = passes
        return states

    def call(self, stream: str, batch: int, index: int, block: nn.Module, hidden: Tensor) -> Tensor:
        one = self._passes[stream][batch]
        args, kwargs = _with_hidden(one.key, one.args, one.kwargs, hidden)
        one.returned = block(*args, **kwargs)
        return first_tensor(one.returned)

    def advance(self, stream: str, states: list[Tensor]) -> tuple[int | None, list[Tensor]]:
        passes = self._passes[stream]
        entered = [one.reach_block(one.returned) for one in passes]
        stand = {one.index for one in passes}
        if len(stand) > 1:
            raise RuntimeError(f"the batches of one stream stand at different blocks: {sorted(stand)}")
        return stand.pop(), entered

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


def open_flow(skeleton: Skeleton, device: torch.device | str = "cpu") -> Flow:
    """The flow for what was discovered of the model."""
    live = skeleton.structure.flows or skeleton.sees_pictures  # rows with pictures differ in length and arguments
    return LiveFlow(skeleton, device) if live else ChainedFlow(skeleton, device)


class _ModelPass(greenlet):
    """One batch's pass through the model, and the call of a block at which it stands.

    Attributes:
        index: the block's number; the number of blocks at the end.
        args, kwargs: what it is called with, ``key`` says as what the hidden states are.
        returned: what the block returned, for the model to go on with.
        final: what the model returned, at the end.
    """

    index: int = -1
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}  # noqa: RUF012  # replaced at each stop, never changed
    key: str | int = 0
    returned: Any = None
    final: Any = None

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

"""A model's own forward pass, held whenever it calls one of its blocks."""

from collections.abc import Callable
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from leangrid.errors import ArchitectureError
from leangrid.models.calls import hidden_argument
from leangrid.models.model_inputs import Inputs, moved_inputs
from leangrid.models.skeleton import Skeleton

Put = Callable[[Tensor], Tensor]
Get = Callable[[Tensor, torch.device], Tensor]

FOLLOWS_TEXT = "Which blocks are called depends on the text, which leangrid cannot follow"
END = 1 << 30  # the index at which a pass stands that ran to its end


class ModelPass(greenlet):
    """One batch's pass through the model, and the call of a block at which it stands.

    Attributes:
        index: the block's number; the number of blocks at the end.
        args, kwargs: what it is called with, ``key`` says as what the hidden states are.
        returned: what the block returned, for the model to go on with.
        final: what the model returned, at the end.
        calls: at how many calls of blocks it has stopped so far.
        held: the states that may be put away while it stands: each with what was put away of it (None: nothing is), and
            how often it had been changed then.
    """

    index: int = -1
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}  # noqa: RUF012  # replaced at each stop, never changed
    key: str | int = 0
    returned: Any = None
    final: Any = None
    calls: int = 0

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
            self.index, self.final, self.args, self.kwargs = END, reached, (), {}
            return torch.empty(0)
        self.index, self.args, self.kwargs = reached
        self.calls += 1
        self.key, hidden = hidden_argument(self.args, self.kwargs)
        if hidden is None:
            raise ArchitectureError("it is called without hidden states", f"block {self.index}", FOLLOWS_TEXT)
        return hidden


def run_of(skeleton: Skeleton, inputs: Inputs, device: torch.device | str) -> Callable[[], Any]:
    """What runs the model on ``inputs``."""
    return lambda: skeleton.run(moved_inputs(inputs, device, skeleton.compute_dtype))


def stop_in(block: nn.Module, index: int) -> None:
    """Let a pass through the model stop where it calls ``block``; anyone else calls it as it is."""
    own = type(block).forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        current = getcurrent()
        if isinstance(current, ModelPass) and current.parent is not None:
            return current.parent.switch((index, args, kwargs))
        return own(block, *args, **kwargs)

    block.forward = forward


def expected_call(skeleton: Skeleton, calls: int) -> int:
    """Which block a pass calls after ``calls`` calls, as it was seen to do; END behind the last."""
    order = skeleton.structure.order
    return order[calls] if calls < len(order) else END


def require_order(skeleton: Skeleton, one: ModelPass, before: int) -> None:
    """ArchitectureError unless a pass that has made ``before`` calls stands where it was seen to go on to."""
    expected = expected_call(skeleton, before)
    if one.index != expected:
        raise other_order(skeleton, expected, one.index)


def other_order(skeleton: Skeleton, expected: int, found: int) -> ArchitectureError:
    """The error for a pass that calls block ``found`` where it was seen to call ``expected``."""
    what = "its blocks are called in another order than when it was looked at, or without hidden states"
    if found != expected:
        what = f"its blocks are called in another order than when it was looked at: {_name(skeleton, found)} is next"
    return ArchitectureError(what, _name(skeleton, expected), FOLLOWS_TEXT)


def _name(skeleton: Skeleton, index: int) -> str:
    names = [block.path for block in skeleton.structure.blocks] + list(skeleton.structure.idle)
    return names[index] if index < len(names) else "the end of its blocks"

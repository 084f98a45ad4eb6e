"""The passes in which a model is looked at (discovery.py): which modules were called with what, and what was done with
its weights. In the second the blocks do nothing."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from leangrid.errors import ArchitectureError, first_line
from leangrid.models.calls import (
    Digests,
    argument_versions,
    changed_arguments,
    fill,
    find_tensor,
    hidden_argument,
    other_tensors,
    place_of,
    tensors_of,
    without_numbers,
)
from leangrid.models.contexts import entered_since, settings
from leangrid.models.experts import Experts, modules_outside_experts
from leangrid.models.linears import is_linear
from leangrid.models.shape_pass import ShapePass, storage_of

Run = Callable[[nn.Module, int], Any]  # runs a module on the text of this number

WAY_OUT = "leangrid cannot quantize this kind of model"
_PRODUCTS = frozenset(("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "_grouped_mm", "linear"))
# What makes a new tensor like another one reads nothing of it but shape and dtype.
_LIKE = frozenset(
    ("empty_like", "zeros_like", "ones_like", "full_like", "new_empty", "new_zeros", "new_ones", "new_full")
)
_LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


@dataclass
class BlockCall:
    """One call of a module that may be a block.

    Attributes:
        entered, left: where the hidden states lie that it was given and that it returned.
        others: its other tensors.
        windows: the first dimension of its hidden states.
        same_shape: whether the states that it returned have the shape of those that it was given.
        returned: the container of its outputs, on the meta device.
        context: a setting of torch (contexts.py) that was changed around the call.
        changed: the arguments that it changed in place; "" stands for the hidden states.
    """

    name: str
    entered: tuple[int, ...] | None
    others: dict[str, tuple[float, ...]]
    windows: int = 1
    same_shape: bool = False
    left: tuple[int, ...] | None = None
    returned: Any = None
    context: str | None = None
    changed: tuple[str, ...] = ()


class LinearCall(NamedTuple):
    """One call of a linear or of a mixture of experts: where its input lies (None for experts, nowhere in a setting of
    its own), and the setting of torch that was changed around it."""

    name: str
    place: tuple[int, ...] | None
    context: str | None


@dataclass
class Log:
    """The calls of the first pass, in their order, and for each mixture of experts through how many of them a token
    goes."""

    blocks: list[BlockCall] = field(default_factory=list)
    linears: list[LinearCall] = field(default_factory=list)
    choices: dict[str, int] = field(default_factory=dict)


class Looking(ShapePass):
    """Also notes what is done with the weights of a model, and which modules are at work then.

    Attributes:
        products: storage of a weight -> the innermost modules at work when it was multiplied.
        uses: storage of a weight -> the modules at work, from the outermost to the innermost, each time it was read.
        changed: storage of a weight that was changed in place -> by which operation.
        draws: the modules that drew random numbers.
    """

    def __init__(self, model: nn.Module, stack: list[str]) -> None:
        super().__init__()
        self._stack = stack
        self._weights = {
            storage_of(parameter)
            for _, module in modules_outside_experts(model)
            for parameter in module._parameters.values()
            if parameter is not None
        }
        self.products: dict[int, set[str]] = {}
        self.uses: dict[int, set[tuple[str, ...]]] = {}
        self.changed: dict[int, str] = {}
        self.draws: list[str] = []
        self._drawing: dict[Any, bool] = {}  # operation -> whether it may draw random numbers

    def note(self, func: Any, given: list[Tensor], args: Any, kwargs: dict[str, Any]) -> set[int]:
        """Note one operation on the tensors ``given``."""
        storages = super().note(func, given, args, kwargs)
        draws = self._drawing.get(func)
        if draws is None:
            draws = self._drawing[func] = torch.Tag.nondeterministic_seeded in func.tags
        if draws and not _draws_nothing(func, args, kwargs):
            self.draws.append(self._stack[-1] if self._stack else "")
        used = storages & self._weights
        if not used:
            return storages
        name = func.overloadpacket.__name__
        if _changes_nothing(name, args):
            return storages
        at = tuple(self._stack)
        for storage in used:
            if not func.is_view and name not in _LIKE:
                self.uses.setdefault(storage, set()).add(at)
            if name in _PRODUCTS:
                self.products.setdefault(storage, set()).add(at[-1] if at else "")
        if func._schema.is_mutable:
            for storage in {storage_of(x) for x in _written(func, args, kwargs)} & used:
                self.changed.setdefault(storage, name)
        return storages


def _written(func: Any, args: Any, kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """The tensors that an operation changes in place."""
    for number, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from tensors_of(args[number] if number < len(args) else kwargs.get(argument.name))


def _changes_nothing(name: str, args: Any) -> bool:
    """Whether a change in place is none, such as a division by 1."""
    same = {"mul_": 1, "div_": 1, "add_": 0, "sub_": 0}.get(name)
    return same is not None and len(args) == 2 and not isinstance(args[1], Tensor) and args[1] == same


def _draws_nothing(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether an operation that may draw random numbers does not: attention without dropout."""
    names = [argument.name for argument in func._schema.arguments]
    if "dropout_p" not in names:
        return False
    at = names.index("dropout_p")
    return not (args[at] if at < len(args) else kwargs.get("dropout_p", 0.0))


def first_pass(model: nn.Module, entry: nn.Module, run: Run, look: Callable[[], None]) -> tuple[Log, Looking]:
    """Run ``entry`` once under hooks on every module of ``model`` outside of the experts; ``look`` is called behind the
    first block.

    Raises ArchitectureError, which names the module at work, if the forward pass fails."""
    watched = dict(modules_outside_experts(model))
    first = _FirstPass(model, watched, look)
    with ExitStack() as hooks:
        hooks.enter_context(idle_experts(watched.values()))
        for module in {id(module): module for module in watched.values()}.values():
            hooks.callback(module.register_forward_pre_hook(first.enter, with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(first.leave, with_kwargs=True).remove)
        try:
            with torch.no_grad(), first.looking:
                first.settings |= settings()
                run(entry, 0)
        except MemoryError:
            raise
        except Exception as error:  # the model's own code may raise anything
            at = f", in module {first.stack[-1]}" if any(first.stack) else ""
            what = f"its forward pass cannot be followed on text alone: {first_line(error).rstrip('.')}{at}"
            raise ArchitectureError(what, type(model).__name__, WAY_OUT) from error
    return first.log, first.looking


class _FirstPass:
    """The hooks of the first pass, and what they noted.

    Attributes:
        stack: the paths of the modules at work, the innermost last.
        settings: those of torch when the pass began.
    """

    def __init__(self, model: nn.Module, watched: dict[str, nn.Module], look: Callable[[], None]) -> None:
        self.log, self.stack, self.settings = Log(), list[str](), dict[str, Any]()
        self.looking = Looking(model, self.stack)
        self._names = {id(module): name for name, module in reversed(watched.items())}
        # Known before the pass: a subclass is tried on random numbers, which the model did not draw.
        self._linears = {id(module) for module in watched.values() if is_linear(module)}
        self._members = {
            id(child)
            for module in watched.values()
            if isinstance(module, _LISTS) and not isinstance(module, Experts)
            for child in module.children()
        }
        self._to_look, self._alive, self._round = [look], list[Any](), 0
        self.digests = Digests()
        self._open: list[tuple[BlockCall, Any]] = []

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Note that ``module`` is called."""
        name = self._names.get(id(module), "")
        self.stack.append(name)
        if isinstance(module, Experts):
            self.log.linears.append(LinearCall(name, None, entered_since(self.settings)))
            self.log.choices[name] = module.choices(args, kwargs)
        elif id(module) in self._linears:
            x, context = args[0] if args else next(iter(kwargs.values())), entered_since(self.settings)
            self._alive.append(x)
            self.log.linears.append(LinearCall(name, (*place_of(x), self._round) if context is None else (), context))
        if id(module) in self._members and id(module) not in self._linears:
            key, x = hidden_argument(args, kwargs)
            call = BlockCall(name, None if x is None else place_of(x), other_tensors(args, kwargs, key, self.digests))
            call.context = entered_since(self.settings)
            self._open.append((call, argument_versions(args, kwargs)))
            self.log.blocks.append(call)
            self._alive.append((args, kwargs))

    def leave(self, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        """Note what a module that may be a block has returned."""
        self.stack.pop()
        if id(module) not in self._members or id(module) in self._linears:
            return
        (call, versions), y = self._open.pop(), find_tensor(out)
        key, x = hidden_argument(args, kwargs)
        floats = x is not None and y is not None and x.is_floating_point() and x.ndim >= 3
        call.windows = x.shape[0] if x is not None and x.ndim else 1
        call.same_shape = bool(floats and x.shape == y.shape)  # pyright: ignore[reportOptionalMemberAccess]
        call.left, call.returned = None if y is None else place_of(y), without_numbers(out)
        changed = changed_arguments(versions, args, kwargs)
        call.changed = tuple("" if path == str(key) else path for path in changed)
        if not self._open:  # what one block held; its output lives on as the input of the next
            self._alive[:] = [out]
            self._round += 1  # memory that is free now may hold another tensor in the same place
            while self._to_look:
                self._to_look.pop()()


def second_pass(model: nn.Module, entry: nn.Module, run: Run, calls: list[BlockCall]) -> list[str]:
    """Which arguments of the blocks are others when the tokens are others and the blocks return their input."""
    flows: list[str] = []
    seen, digests = [0], Digests()

    def empty(name: str, args: Any, kwargs: Any) -> Any:
        number, (key, x) = seen[0], hidden_argument(args, kwargs)
        seen[0] += 1
        if number >= len(calls) or calls[number].name != name or x is None:
            raise _Strayed(f"{name} is called out of turn where blocks do nothing")
        others = other_tensors(args, kwargs, key, digests)
        for argument in calls[number].others.keys() | others.keys():
            if calls[number].others.get(argument) != others.get(argument):
                flows.append(f"{argument} of {name}")
        return fill(calls[number].returned, x)

    try:
        with blocks_that(model, (call.name for call in calls), empty), torch.no_grad(), ShapePass():
            run(entry, 1)
    except Exception as error:  # blocks that do nothing may break any assumption of the model's own code
        return [f"the model's own forward needs its blocks ({first_line(error)})"]
    if seen[0] != len(calls):
        return [f"{len(calls)} calls of blocks, {seen[0]} where blocks do nothing"]
    return sorted(set(flows))


@contextmanager
def blocks_that(model: nn.Module, names: Iterable[str], call: Callable[[str, Any, Any], Any]) -> Iterator[None]:
    """Context: the modules ``names`` do what ``call`` does with their name, args and kwargs."""
    blocks = {name: model.get_submodule(name) for name in names}
    try:
        for name, block in blocks.items():
            block.forward = lambda *args, name=name, **kwargs: call(name, args, kwargs)
        yield
    finally:
        for block in blocks.values():
            del block.forward


@contextmanager
def idle_experts(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Context: modules of experts give their input back, changed; what their linears read is known."""
    mixtures = [module for module in modules if isinstance(module, Experts)]
    for module in mixtures:
        module.forward = partial(_changed, module.form.returned)
    try:
        yield
    finally:
        for module in mixtures:
            del module.forward


def _changed(width: int, hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
    if width != hidden_states.shape[-1]:
        hidden_states = hidden_states[..., torch.arange(width) % hidden_states.shape[-1]]
    return torch.sin(hidden_states)


class _Strayed(Exception):
    """A pass of empty blocks went another way."""

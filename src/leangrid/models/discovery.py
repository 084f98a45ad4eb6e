"""Where a model's blocks are, which linears of a block read the same input, and what flows between blocks.

Nothing here knows an architecture's name. The model runs once on a few tokens with its weights absent (shape_pass.py),
under hooks on every module:

* blocks are the lists of modules through which hidden states of one shape run;
* a group is the linears, called one after another, that are handed the same tensor: same storage, place and version.
  They share a Hessian;
* a second pass, of other tokens and with blocks that return their input, shows which arguments of the blocks depend on
  earlier blocks or on the tokens. Where none does, hidden states are all that flows, and a block can be run alone.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from leangrid.errors import ArchitectureError, first_line
from leangrid.models.calls import fill, find_tensor, hidden_argument, other_tensors, place_of, without_numbers
from leangrid.models.experts import Experts, modules_outside_experts
from leangrid.models.groups import Groups, Places, group_by_input
from leangrid.models.kept import why_kept
from leangrid.models.linears import is_linear, linear_shape
from leangrid.models.shape_pass import ShapePass, small_parameters, storage_of

ELSEWHERE = "its weight is multiplied in"  # how a reason begins why a linear is kept
_LEAST_SHARE = 20  # a list of blocks holds at least this part (1/20) of the numbers that the largest one holds
_PRODUCTS = frozenset(("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "_grouped_mm", "linear"))
_LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


@dataclass(frozen=True)
class FoundBlock:
    """One block.

    Attributes:
        path: in the model.
        groups: its linears by shared input, in the order of their first calls, as paths from the block. All experts'
            linears of one stage (experts.py) are one group.
        kept: its linears that stay as they are -> why.
        repeated: groups (by number) whose linears are called more than once in a pass, on other inputs.
        left: matrices that are multiplied outside of any linear -> shape.
        returns: the container of what it returns, its tensors on the meta device.
        reads: its linears in the order of their first calls -> where their inputs lay; of mixtures of experts nothing.
        fixed: those of ``kept`` that cannot be quantized, whatever is asked for (selection.py) -> why.
    """

    path: str
    groups: Groups
    kept: Mapping[str, str] = field(default_factory=dict)
    repeated: frozenset[int] = frozenset()
    left: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    returns: Any = None
    reads: Mapping[str, Places] = field(default_factory=dict)
    fixed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Structure:
    """What was found.

    Attributes:
        blocks: in the order of their first call.
        order: the blocks, by number, as one forward pass calls them.
        flows: what passes between blocks beside the hidden states, or how they are not simply chained; empty: nothing.
        lists: the paths of the lists of blocks.
        idle: blocks of these lists that text does not reach.
        unused: parameters that a pass on text does not touch, such as those of a tower for pictures.
    """

    blocks: tuple[FoundBlock, ...]
    order: tuple[int, ...]
    flows: tuple[str, ...]
    lists: tuple[str, ...]
    idle: tuple[str, ...]
    unused: frozenset[str]


@dataclass
class _Call:
    """One call of a module that may be a block."""

    name: str
    entered: tuple[int, ...] | None  # where its hidden states lie
    others: dict[str, tuple[float, ...]]  # its other tensors
    windows: int = 1  # the first dimension of its hidden states
    same_shape: bool = False
    left: tuple[int, ...] | None = None
    returned: Any = None  # the container of its outputs, on the meta device


@dataclass
class _Log:
    """What the first pass showed."""

    calls: list[_Call] = field(default_factory=list)
    called: list[tuple[str, tuple[int, ...] | None]] = field(default_factory=list)  # linears: where their input lies


def discover(model: nn.Module, entry: nn.Module, run: Callable[[nn.Module, int], Any]) -> Structure:
    """Find the structure of ``model``.

    Args:
        model: parameters on the meta device; buffers computed.
        entry: the module of it that is run.
        run: runs ``entry`` once on the token ids of a number that tells texts apart; the forward pass may raise.

    Raises:
        ArchitectureError: the forward pass fails, or no list of modules runs hidden states from one to the next.
    """
    with small_parameters(model):
        log, shapes = _first_pass(model, entry, run)
        lists = _block_lists(model, log.calls)
        if not lists:
            what = "no list of modules runs hidden states of one shape from one to the next"
            raise ArchitectureError(what, type(model).__name__, "leangrid cannot quantize this kind of model")
        calls = [call for call in log.calls if call.name.rpartition(".")[0] in lists]
        names = list(dict.fromkeys(call.name for call in calls))
        flows = _chains(calls)
        flows += [] if flows else _second_pass(model, entry, run, calls)
        shared, by_block = _shared_weights(model), _by_block(log, names)
        returned = {call.name: call.returned for call in reversed(calls)}
        blocks = tuple(_found_block(model, name, by_block[name], shapes, shared, returned[name]) for name in names)
        idle = tuple(
            f"{path}.{child}"
            for path in lists
            for child, _ in model.get_submodule(path).named_children()
            if f"{path}.{child}" not in names
        )
        order = tuple(names.index(call.name) for call in calls)
        unused = frozenset(
            name for name, parameter in _parameters_outside(model, lists) if storage_of(parameter) not in shapes.touched
        )
    return Structure(blocks, order, tuple(flows), tuple(lists), idle, unused)


# ---------------------------------------------------------------- the two passes


class _Looking(ShapePass):
    """Also notes which module was at work when a weight was multiplied."""

    def __init__(self, stack: list[str]) -> None:
        super().__init__()
        self.stack = stack
        self.products: dict[int, set[str]] = {}  # storage -> names of the modules at work

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in _PRODUCTS:
            for x in args:
                if isinstance(x, Tensor):
                    self.products.setdefault(storage_of(x), set()).add(self.stack[-1] if self.stack else "")
        return super().__torch_dispatch__(func, types, args, kwargs)


def _first_pass(model: nn.Module, entry: nn.Module, run: Callable[[nn.Module, int], Any]) -> tuple[_Log, _Looking]:
    log, stack, alive = _Log(), list[str](), list[Any]()
    watched = dict(modules_outside_experts(model))
    names = {id(module): name for name, module in reversed(watched.items())}
    members = {
        id(child)
        for module in watched.values()
        if isinstance(module, _LISTS) and not isinstance(module, Experts)
        for child in module.children()
    }
    depth, looking = [0], _Looking(stack)
    open_calls: list[_Call] = []

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        name = names.get(id(module), "")
        stack.append(name)
        if isinstance(module, Experts):
            log.called.append((name, None))
        elif is_linear(module):
            x = args[0] if args else next(iter(kwargs.values()))
            alive.append(x)
            log.called.append((name, place_of(x)))
        if id(module) in members and not is_linear(module):
            key, x = hidden_argument(args, kwargs)
            open_calls.append(_Call(name, None if x is None else place_of(x), other_tensors(args, kwargs, key)))
            log.calls.append(open_calls[-1])
            alive.append((args, kwargs))
            depth[0] += 1

    def leave(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        stack.pop()
        if id(module) in members and not is_linear(module):
            call, y = open_calls.pop(), find_tensor(out)
            _, x = hidden_argument(args, kwargs)
            floats = x is not None and y is not None and x.is_floating_point() and x.ndim >= 3
            call.windows = x.shape[0] if x is not None and x.ndim else 1
            call.same_shape = bool(floats and x.shape == y.shape)  # pyright: ignore[reportOptionalMemberAccess]
            call.left, call.returned = None if y is None else place_of(y), without_numbers(out)
            depth[0] -= 1
            if not depth[0]:  # what one block held; its output lives on as the input of the next
                alive[:] = [out]

    with ExitStack() as hooks:
        hooks.enter_context(_idle_experts(watched.values()))
        for module in {id(module): module for module in watched.values()}.values():
            hooks.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(leave, with_kwargs=True).remove)
        _attempt(model, entry, run, 0, looking)
    return log, looking


def _second_pass(
    model: nn.Module, entry: nn.Module, run: Callable[[nn.Module, int], Any], calls: list[_Call]
) -> list[str]:
    """Which arguments of the blocks are others when the tokens are others and the blocks return their input."""
    flows: list[str] = []
    seen = [0]

    def empty(name: str) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            number, (key, x) = seen[0], hidden_argument(args, kwargs)
            seen[0] += 1
            if number >= len(calls) or calls[number].name != name or x is None:
                raise _Strayed(f"{name} is called out of turn where blocks do nothing")
            others = other_tensors(args, kwargs, key)
            for argument in calls[number].others.keys() | others.keys():
                if calls[number].others.get(argument) != others.get(argument):
                    flows.append(f"{argument} of {name}")
            return fill(calls[number].returned, x)

        return forward

    blocks = {call.name: model.get_submodule(call.name) for call in calls}
    try:
        for name, block in blocks.items():
            block.forward = empty(name)
        with torch.no_grad(), ShapePass():
            run(entry, 1)
    except Exception as error:  # blocks that do nothing may break any assumption of the model's own code
        return [f"the model's own forward needs its blocks ({first_line(error)})"]
    finally:
        for block in blocks.values():
            del block.forward
    if seen[0] != len(calls):
        return [f"{len(calls)} calls of blocks, {seen[0]} where blocks do nothing"]
    return sorted(set(flows))


@contextmanager
def _idle_experts(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Context: modules of experts give their input back, changed; what their linears read is known."""
    mixtures = [module for module in modules if isinstance(module, Experts)]
    for module in mixtures:
        module.forward = _changed
    try:
        yield
    finally:
        for module in mixtures:
            del module.forward


def _changed(hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
    return torch.sin(hidden_states)


class _Strayed(Exception):
    """A pass of empty blocks went another way."""


def _attempt(
    model: nn.Module, entry: nn.Module, run: Callable[[nn.Module, int], Any], number: int, mode: ShapePass
) -> None:
    try:
        with torch.no_grad(), mode:
            run(entry, number)
    except MemoryError:
        raise
    except Exception as error:  # the model's own code may raise anything
        what = f"its forward pass cannot be followed on text alone: {first_line(error)}"
        raise ArchitectureError(what, type(model).__name__, "leangrid cannot quantize this kind of model") from error


# ---------------------------------------------------------------- what they say


def _block_lists(model: nn.Module, calls: list[_Call]) -> list[str]:
    """The outermost lists of modules with matrices that give back hidden states in the shape in which they came, in the
    order of their first calls."""
    alike: dict[str, bool] = {}
    for call in calls:
        path = call.name.rpartition(".")[0]
        alike[path] = alike.get(path, True) and call.same_shape
    found = [
        path
        for path, same in alike.items()
        if same and any(p.ndim >= 2 for p in next(iter(model.get_submodule(path).children())).parameters())
    ]
    outer = [path for path in found if not any(path != other and path.startswith(f"{other}.") for other in found)]
    numbers = {path: _numbers_in(model.get_submodule(path)) for path in outer}
    most = max(numbers.values(), default=0)
    return [path for path in outer if numbers[path] * _LEAST_SHARE >= most]


def _numbers_in(module: nn.Module) -> int:
    return sum(
        len(inner) * sum(math.prod(inner.form.shape(leaf)) for leaves in inner.form.stages for leaf in leaves)
        if isinstance(inner, Experts)
        else sum(p.numel() for p in inner._parameters.values() if p is not None)
        for _, inner in modules_outside_experts(module)
    )


def _chains(calls: list[_Call]) -> list[str]:
    """How the blocks are not one chain: called again, or reading something else than the one before returned."""
    flows: list[str] = []
    names = [call.name for call in calls]
    flows += [f"the states of {call.name} are not [windows, ...]" for call in calls[:1] if call.windows != 1]  # one ran
    if len(set(names)) < len(names):
        flows.append(f"{next(n for n in names if names.count(n) > 1)} is called more than once")
    for before, call in pairwise(calls):
        if before.left is None or call.entered != before.left:
            flows.append(f"the input of {call.name} is not the output of {before.name}")
    return flows


def _parameters_outside(model: nn.Module, lists: list[str]) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that are in none of the lists of blocks, with their names."""
    blocks = tuple(f"{path}." for path in lists)
    for path, module in modules_outside_experts(model):
        if not path.startswith(blocks):
            yield from (
                (f"{path}.{name}" if path else name, p) for name, p in module._parameters.items() if p is not None
            )


def _by_block(log: _Log, blocks: list[str]) -> dict[str, list[tuple[str, tuple[int, ...] | None]]]:
    """The calls of each block's linears (where their input lies) and experts (None), as paths from the block."""
    found: dict[str, list[tuple[str, tuple[int, ...] | None]]] = {path: [] for path in blocks}
    for name, where in log.called:
        path = name
        while path and path not in found:
            path = path.rpartition(".")[0]
        if path:
            found[path].append((name[len(path) + 1 :], where))
    return found


def _found_block(
    model: nn.Module,
    path: str,
    called: list[tuple[str, tuple[int, ...] | None]],
    looking: "_Looking",
    shared: Mapping[int, int],
    returned: Any,
) -> FoundBlock:
    block, dot = model.get_submodule(path), f"{path}."
    inside = dict(modules_outside_experts(block))
    linears = {name: module for name, module in inside.items() if is_linear(module)}
    mixtures = {name: module for name, module in inside.items() if isinstance(module, Experts)}
    places: dict[str, list[tuple[int, ...]]] = {}
    for name, where in called:
        if where is not None and where not in places.setdefault(name, []):
            places[name].append(where)
    kept, fixed = dict[str, str](), dict[str, str]()
    for name, module in linears.items():
        weight = module.get_parameter("weight")
        why = why_kept(name, *linear_shape(module))
        others = looking.products.get(storage_of(weight), set()) - {dot + name}
        cannot = None
        if name not in places:
            why = cannot = "is not called on text"
        elif others:
            cannot = f"{ELSEWHERE} {min(others)} too"
        elif shared[id(weight)] > 1:
            cannot = "shares its weight with another module"
        if cannot is not None:
            fixed[name] = cannot
        why = why or cannot
        if why is not None:
            kept[name] = why
    order = dict.fromkeys(name for name, _ in called if name in mixtures or name in places)
    reads = {name: tuple(places.get(name, ())) for name in order}
    groups, repeated = group_by_input(reads, kept, mixtures)
    left = {
        f"{name}.{leaf}" if name else leaf: tuple(parameter.shape)
        for name, module in inside.items()
        if name not in linears
        for leaf, parameter in module.named_parameters(recurse=False)
        if parameter.ndim >= 2 and storage_of(parameter) in looking.products
    }
    return FoundBlock(path, groups, kept, repeated, left, returned, reads, fixed)


def _shared_weights(model: nn.Module) -> Counter[int]:
    """How many names each parameter has, by its id; those of experts are left out, which share nothing."""
    found: Counter[int] = Counter()
    for _, module in modules_outside_experts(model):
        found.update(id(parameter) for parameter in module._parameters.values() if parameter is not None)
    return found

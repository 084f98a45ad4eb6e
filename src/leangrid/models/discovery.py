"""Where a model's blocks are, which linears of a block read the same input, and what flows between blocks.

Nothing here knows an architecture's name. The model runs once on a few tokens with its weights absent (passes.py,
shape_pass.py), under hooks on every module:

* blocks are the lists of modules through which hidden states of one shape run;
* a group is the linears, called one after another, that are handed the same tensor: same storage, place and version.
  They share a Hessian;
* a second pass, of other tokens and with blocks that return their input, shows which arguments of the blocks depend on
  earlier blocks or on the tokens. Where none does, hidden states are all that flows, and a block can be run alone.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from leangrid.errors import ArchitectureError
from leangrid.machine.memory import keep_freed_memory
from leangrid.models.assumptions import Before, block_around, check_assumptions
from leangrid.models.experts import Experts, modules_outside_experts
from leangrid.models.groups import Groups, Places, group_by_input
from leangrid.models.kept import why_kept
from leangrid.models.linears import has_hooks, is_linear, linear_shape, makes_its_weight
from leangrid.models.passes import WAY_OUT, BlockCall, LinearCall, Log, Looking, Run, first_pass, second_pass
from leangrid.models.shape_pass import small_parameters, storage_of

ELSEWHERE = "its weight is used in"  # how a reason begins why a linear is kept
_LEAST_SHARE = 20  # a list of blocks holds at least this part (1/20) of the numbers that the largest one holds


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
        changes: whether it changes its arguments in place, or puts something into them.
    """

    path: str
    groups: Groups
    kept: Mapping[str, str] = field(default_factory=dict)
    repeated: frozenset[int] = frozenset()
    left: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    returns: Any = None
    reads: Mapping[str, Places] = field(default_factory=dict)
    fixed: Mapping[str, str] = field(default_factory=dict)
    changes: bool = False


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
        choices: the path of each mixture of experts -> through how many of them a token goes.
    """

    blocks: tuple[FoundBlock, ...]
    order: tuple[int, ...]
    flows: tuple[str, ...]
    lists: tuple[str, ...]
    idle: tuple[str, ...]
    unused: frozenset[str]
    choices: Mapping[str, int] = field(default_factory=dict)


def discover(model: nn.Module, entry: nn.Module, run: Run) -> Structure:
    """Find the structure of ``model``.

    Args:
        model: parameters on the meta device; buffers computed.
        entry: the module of it that is run.
        run: runs ``entry`` once on the token ids of a number that tells texts apart (0, 1, and LONGER); the forward
            pass may raise.

    Raises:
        ArchitectureError: the forward pass fails, no list of modules runs hidden states from one to the next, or the
            model breaks what the walk assumes (assumptions.py).
    """
    keep_freed_memory()
    with torch.random.fork_rng(devices=[]), small_parameters(model):
        before = Before(model)
        log, looking = first_pass(model, entry, run, before.look)
        lists = _block_lists(model, log.blocks)
        if not lists:
            what = "no list of modules runs hidden states of one shape from one to the next"
            raise ArchitectureError(what, type(model).__name__, WAY_OUT)
        calls = [call for call in log.blocks if call.name.rpartition(".")[0] in lists]
        check_assumptions(model, entry, run, log, looking, calls, before)
        names = list(dict.fromkeys(call.name for call in calls))
        flows = _chains(calls)
        flows += [] if flows else second_pass(model, entry, run, calls)
        flows += [] if flows else _changed_arguments(calls)
        shared, by_block = _shared_weights(model), _by_block(log, names)
        first = {call.name: call for call in reversed(calls)}
        changing = {call.name for call in calls if call.changed}
        blocks = tuple(
            _found_block(model, first[name], by_block[name], looking, shared, name in changing) for name in names
        )
        idle = tuple(
            f"{path}.{child}"
            for path in lists
            for child, _ in model.get_submodule(path).named_children()
            if f"{path}.{child}" not in names
        )
        order = tuple(names.index(call.name) for call in calls)
        unused = frozenset(
            name
            for name, parameter in _parameters_outside(model, lists)
            if storage_of(parameter) not in looking.touched
        )
    return Structure(blocks, order, tuple(flows), tuple(lists), idle, unused, log.choices)


def _block_lists(model: nn.Module, calls: list[BlockCall]) -> list[str]:
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
        inner.form.numbers
        if isinstance(inner, Experts)
        else sum(p.numel() for p in inner._parameters.values() if p is not None)
        for _, inner in modules_outside_experts(module)
    )


def _chains(calls: list[BlockCall]) -> list[str]:
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


def _changed_arguments(calls: list[BlockCall]) -> list[str]:
    return [f"{argument} of {call.name} is changed by it" for call in calls for argument in call.changed if argument]


def _parameters_outside(model: nn.Module, lists: list[str]) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that are in none of the lists of blocks, with their names."""
    blocks = tuple(f"{path}." for path in lists)
    for path, module in modules_outside_experts(model):
        if not path.startswith(blocks):
            yield from (
                (f"{path}.{name}" if path else name, p) for name, p in module._parameters.items() if p is not None
            )


def _by_block(log: Log, blocks: list[str]) -> dict[str, list[LinearCall]]:
    """The calls of each block's linears and experts, named by their paths from the block."""
    found: dict[str, list[LinearCall]] = {path: [] for path in blocks}
    for call in log.linears:
        path = block_around(call.name, found)
        if path:
            found[path].append(call._replace(name=call.name[len(path) + 1 :]))
    return found


def _found_block(
    model: nn.Module,
    call: BlockCall,
    called: list[LinearCall],
    looking: Looking,
    shared: Mapping[int, int],
    changes: bool,
) -> FoundBlock:
    block = model.get_submodule(call.name)
    inside = dict(modules_outside_experts(block))
    linears = {name: module for name, module in inside.items() if is_linear(module)}
    mixtures = {name: module for name, module in inside.items() if isinstance(module, Experts)}
    places: dict[str, list[tuple[int, ...]]] = {}
    for name, place, _ in called:
        if place is not None and place not in places.setdefault(name, []):
            places[name].append(place)
    kept, fixed = dict[str, str](), dict[str, str]()
    contexts = {name: context for name, _, context in called if context is not None}
    for name, module in linears.items():
        cannot = "is not called on text" if name not in places else None
        if cannot is None and name in contexts:
            cannot = f"is called under {contexts[name]}"
        cannot = cannot or _why_fixed(f"{call.name}.{name}", module, looking, shared)
        if cannot is not None:
            fixed[name] = cannot
        # that text does not reach it says more than a custom
        why = cannot if name not in places else why_kept(name, *linear_shape(module)) or cannot
        if why is not None:
            kept[name] = why
    computed = [name for name, module in inside.items() if makes_its_weight(module)]
    for name in computed:
        kept[name] = fixed[name] = "its weight is computed whenever it is called"
    order = dict.fromkeys(name for name, _, _ in called if name in mixtures or name in places)
    reads = {name: tuple(places.get(name, ())) for name in order}
    groups, repeated = group_by_input(reads, kept, mixtures)
    left = {
        f"{name}.{leaf}" if name else leaf: tuple(parameter.shape)
        for name, module in inside.items()
        if name not in linears and not name.startswith(tuple(f"{path}." for path in computed))
        for leaf, parameter in module.named_parameters(recurse=False)
        if parameter.ndim >= 2 and storage_of(parameter) in looking.products
    }
    return FoundBlock(call.name, groups, kept, repeated, left, call.returned, reads, fixed, changes)


def _why_fixed(path: str, module: nn.Module, looking: Looking, shared: Mapping[int, int]) -> str | None:
    """Why a linear that text reaches cannot be quantized; None where it can."""
    weight = module.get_parameter("weight")
    others = {at[-1] if at else "the model itself" for at in looking.uses.get(storage_of(weight), ())} - {path}
    if others:
        return f"{ELSEWHERE} {min(others)} too"
    if shared[id(weight)] > 1:
        return "shares its weight with another module"
    return "has hooks of its own" if has_hooks(module) else None


def _shared_weights(model: nn.Module) -> Counter[int]:
    """How many names each parameter has, by its id; those of experts are left out, which share nothing."""
    found: Counter[int] = Counter()
    for _, module in modules_outside_experts(model):
        found.update(id(parameter) for parameter in module._parameters.values() if parameter is not None)
    return found

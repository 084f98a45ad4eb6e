"""What the walk (flow.py, walk.py) assumes of a model's forward pass, beyond what it follows: checked while the model
is looked at (discovery.py), and where it does not hold refused with the module's name.

* The weights of a block are used inside of it alone: only then are they in memory.
* No weight is changed.
* What is computed depends on no random numbers.
* A block and a mixture of experts are not called in a setting of torch of their own (contexts.py): they are stopped
  there.
* Modules keep nothing from one call to the next that matters: batches and streams take turns at each block.
* How often a block is called does not depend on the length of the text."""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from leangrid.errors import ArchitectureError
from leangrid.models.calls import digest, tensors_of
from leangrid.models.experts import Experts, modules_outside_experts
from leangrid.models.linears import is_linear
from leangrid.models.passes import WAY_OUT, BlockCall, Log, Looking, Run, idle_experts
from leangrid.models.shape_pass import ShapePass, storage_of

LONGER = 2  # the number of a text that is longer than the others
_OF_MODULES = frozenset(vars(nn.Module()))  # attributes that torch's modules have, hooks among them
_PLAIN = (bool, int, float, str, type(None))


class AssumptionError(ArchitectureError):
    """A model that breaks one of them, whichever of its modules is run."""


class Before:
    """What a model's modules held before it ran."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._weights, self._attributes = _weights(model), _attributes(model)
        self._meanwhile: list[str] = []

    def changed_weights(self) -> Iterator[str]:
        """The parameters that are others now, or have another storage."""
        now = _weights(self._model)
        return (name for name, was in self._weights.items() if now.get(name, (None, 0))[1] != was[1])

    def changed_attributes(self) -> list[str]:
        """What else of the modules is another now, or was at ``look``: tensors, numbers, modules within."""
        now = _attributes(self._model)
        both = dict.fromkeys((*self._attributes, *now))
        found = (name for name in both if not _is_same(self._attributes.get(name), now.get(name)))
        return [*self._meanwhile, *found]

    def look(self) -> None:
        """Look while the model runs: what it changes then is changed for whoever else runs."""
        self._meanwhile = self.changed_attributes()


def check_assumptions(
    model: nn.Module, entry: nn.Module, run: Run, log: Log, looking: Looking, calls: list[BlockCall], before: Before
) -> None:
    """Raise AssumptionError, which names a module, for the first assumption that does not hold.

    Args:
        log, looking: of the first pass.
        calls: those of the blocks.
        before: what the modules held before it.
    """

    def refuse(what: str) -> ArchitectureError:
        return AssumptionError(what, type(model).__name__, WAY_OUT)

    blocks = {call.name for call in calls}
    inside = (*((call.name, call.context) for call in calls), *((call.name, call.context) for call in log.linears
              if isinstance(model.get_submodule(call.name), Experts)))  # fmt: skip
    if found := next(((name, context) for name, context in inside if context is not None), None):
        raise refuse(f"{found[0]} is called under {found[1]}, which a pass that stops there would leave")
    if (changed := _changed_weight(model, looking, before)) is not None:
        what = f"its forward pass changes the weight {changed}"
        raise AssumptionError(what, type(model).__name__, "Where config.json can turn that off, do so")
    if foreign := _foreign_use(model, looking, blocks):
        raise refuse(foreign)
    texts = _Texts(model, entry, run, blocks)
    if looking.draws and (drawn := texts.depends_on_chance()) is not None:
        at = next((name for name in looking.draws if name), "the model itself")
        raise refuse(f"what {drawn} reads depends on random numbers, drawn in {at}")
    if (kept := before.changed_attributes()) and not texts.are_the_same_in_turns():
        raise refuse(f"{kept[0]} is kept from one call to the next, and what is computed depends on it")
    names = [call.name for call in calls]
    if len(set(names)) < len(names) and (longer := texts.order(LONGER)) != names:
        name = next((n for n in (*names, *longer) if names.count(n) != longer.count(n)), names[0])
        times = f"{names.count(name)} times, with a longer text {longer.count(name)} times"
        raise refuse(f"{name} is called {times}, and its order of calls has to be the same for every text")


def _changed_weight(model: nn.Module, looking: Looking, before: Before) -> str | None:
    """The name of a parameter that the pass changed, in place or by another one, and how."""
    for path, module in modules_outside_experts(model):
        for leaf, parameter in module._parameters.items():
            if parameter is not None and storage_of(parameter) in looking.changed:
                return f"{path}.{leaf} in place ({looking.changed[storage_of(parameter)]})"
    return next(before.changed_weights(), None)


def _foreign_use(model: nn.Module, looking: Looking, blocks: Collection[str]) -> str | None:
    """Which weights of a block are used where neither their block nor another one that has them, too, is at work."""
    owners: dict[int, dict[str, str]] = {}
    for path, module in modules_outside_experts(model):
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                name = f"{path}.{leaf}" if path else leaf
                owners.setdefault(storage_of(parameter), {}).setdefault(block_around(path, blocks), name)
    found: list[str] = []
    for storage, uses in looking.uses.items():
        within = owners.get(storage, {"": ""})
        for at in () if "" in within else uses:
            if not any(path in within for path in at):
                others = (path for path in reversed(at) if path and block_around(path, blocks) not in within)
                where, module = next(others, "the model itself"), next(iter(within.values())).rpartition(".")[0]
                found.append(f"the weights of {module} are used in {where}, outside of their block")
    return min(found, default=None)


def block_around(path: str, blocks: Collection[str]) -> str:
    """The one of ``blocks`` in which the module at ``path`` lies; "" for none."""
    while path and path not in blocks:
        path = path.rpartition(".")[0]
    return path


class _Texts:
    """Further passes of a model, for the assumptions on which the first cast a doubt."""

    def __init__(self, model: nn.Module, entry: nn.Module, run: Run, blocks: Collection[str]) -> None:
        self._model, self._run, self._blocks = model, lambda number: run(entry, number), blocks

    def order(self, number: int) -> list[str]:
        """The blocks in the order in which text ``number`` calls them."""
        called: list[str] = []
        self._hooked(self._blocks, lambda name, _args, _kwargs: called.append(name), lambda: self._run(number))
        return called

    def depends_on_chance(self) -> str | None:
        """The first block or linear whose arguments are others with other random numbers; None: there is none."""
        linears = [path for path, module in modules_outside_experts(self._model) if is_linear(module)]
        seen: list[list[tuple[str, Any]]] = []

        def note(name: str, args: Any, kwargs: Any) -> None:
            seen[-1].append((name, digest({"args": args, "kwargs": kwargs})))

        for seed in (0, 1):
            seen.append([])
            torch.default_generator.manual_seed(seed)
            self._hooked((*self._blocks, *linears), note, lambda: self._run(0))
        first, second = seen
        for one, other in zip(first, second, strict=False):
            if one != other:
                return one[0]
        return None if len(first) == len(second) else max(first, second, key=len)[min(map(len, seen))][0]

    def are_the_same_in_turns(self) -> bool:
        """Whether two texts whose passes take turns at every block give what each gives alone, and gives again."""
        alone = [digest(self._run_looking(number)) for number in (0, 1)]
        ended: dict[int, Any] = {}

        def stop(_name: str, _args: Any, _kwargs: Any) -> None:
            current = getcurrent()
            if isinstance(current, _Turn) and current.parent is not None:
                current.parent.switch()

        def take_turns() -> None:
            passes = [_Turn(lambda number=number: digest(self._run(number))) for number in (0, 1)]
            while len(ended) < len(passes):
                for number, one in enumerate(passes):
                    found = None if one.dead else one.switch()
                    if one.dead:
                        ended.setdefault(number, found)

        self._hooked(self._blocks, stop, take_turns)
        return [ended[0], ended[1]] == alone and digest(self._run_looking(0)) == alone[0]

    def _run_looking(self, number: int) -> Any:
        found: list[Any] = []
        self._hooked((), lambda _name, _args, _kwargs: None, lambda: found.append(self._run(number)))
        return found[0]

    def _hooked(self, names: Collection[str], enter: Callable[[str, Any, Any], Any], body: Callable[[], Any]) -> None:
        """Run ``body`` while modules tell ``enter`` with which arguments they are called."""
        with ExitStack() as hooks, torch.no_grad():
            hooks.enter_context(idle_experts(module for _, module in modules_outside_experts(self._model)))
            for name in dict.fromkeys(names):

                def hook(_module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                    enter(name, args, kwargs)

                module = self._model.get_submodule(name)
                hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            hooks.enter_context(ShapePass())
            body()


class _Turn(greenlet):
    """A pass that takes turns with another."""


def _weights(model: nn.Module) -> dict[str, tuple[Tensor, int]]:
    """The parameters by name, and their storages."""
    return {
        f"{path}.{leaf}" if path else leaf: (parameter, storage_of(parameter))
        for path, module in modules_outside_experts(model)
        for leaf, parameter in module._parameters.items()
        if parameter is not None
    }


def _attributes(model: nn.Module) -> dict[str, Any]:
    """What the modules hold beside their parameters, by path and name: numbers and words, and the tensors in anything
    else with their versions."""
    found: dict[str, Any] = {}
    seen: set[int] = set()  # a config hangs on every module
    for path, module in modules_outside_experts(model):
        own = {key: value for key, value in vars(module).items() if key not in _OF_MODULES}
        if isinstance(module, Experts):
            own.pop("forward", None)  # the passes' own (idle_experts)
        found |= {f"{path}.{key}" if path else key: id(child) for key, child in module._modules.items()}
        for key, value in (own | module._buffers).items():
            name = f"{path}.{key}" if path else key
            if isinstance(value, _PLAIN):
                found[name] = value
            elif id(value) not in seen:
                seen.add(id(value))
                found[name] = [(x, x._version) for x in tensors_of(value)]
    return found


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(a[0] is b[0] and a[1] == b[1] for a, b in zip(one, other, strict=True))
    return type(one) is type(other) and one == other

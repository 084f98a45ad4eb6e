"""What a forward pass of transformers' own model multiplies by which weight, and which weights quantization should
take: found without leangrid, from every product with a parameter and from the real widths of the type."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

Weight = tuple[str, int]  # a parameter's name, and which of its experts; -1 where it is one matrix

FEW = 48  # linears with fewer rows or columns than this, in the type's real size, stay in 16 bits
# Kept by custom: what decides or scales more than it weighs.
_ROUTER = r"(^|\.)((\w*_)?router|gate|wg|(\w*_)?(expert|experts|shared)_gate|e_score\w*|classifier)"
CUSTOM: tuple[tuple[str, str], ...] = (
    (_ROUTER + r"(\.(?!.*(gate|up|down)_proj)|$)", "routes tokens"),
    (r"(^|\.)(\w*indexer|weights_proj)(\.|$)", "chooses keys for sparse attention"),
    (r"(^|\.)(in_proj_a|in_proj_b|in_proj_ba|dt_proj|x_proj|A_log)$", "parameters of a state space"),
    (r"(^|\.)(b_proj|a_proj|beta_proj|f_[ab]_proj)$", "decays of a recurrence"),
)


@dataclass
class Use:
    """All products of one forward pass with one matrix.

    Attributes:
        hessian: the sum of x x^T over the inputs, float64 [cols, cols]; None where the matrix came first.
        rows: how many inputs.
        calls: how many products.
        alone: whether each product was inside of a call of the linear that holds the weight, or with an expert.
    """

    hessian: Tensor | None = None
    rows: int = 0
    calls: int = 0
    alone: bool = True


class Products(TorchFunctionMode):
    """While it is entered, every product with a parameter of ``model`` is noted in ``uses``."""

    def __init__(self, model: nn.Module, stack: list[nn.Module]) -> None:
        super().__init__()
        self.uses: dict[Weight, Use] = {}
        self._stack = stack
        self._owners: dict[int, tuple[str, Tensor, list[nn.Module]]] = {}
        for path, module in model.named_modules():
            for leaf, parameter in module.named_parameters(recurse=False):
                name = f"{path}.{leaf}" if path else leaf
                storage = parameter.untyped_storage().data_ptr()
                self._owners.setdefault(storage, (name, parameter, []))[2].append(module)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name in ("linear", "matmul", "__matmul__", "mm", "bmm"):
            given = [*args, *kwargs.values()]
            self._note(given[0], given[1], name == "linear")
        elif name in ("addmm", "baddbmm"):
            given = [*args, *(value for key, value in kwargs.items() if key not in ("alpha", "beta"))]
            self._note(given[1], given[2], False)
        return func(*args, **kwargs)

    def _note(self, x: Tensor, weight: Tensor, rows_first: bool) -> None:
        """One product x W^T (``rows_first``) or x W."""
        first = self._owner(x)
        if first is not None:
            self.uses.setdefault((first[0], -1), Use()).alone = False
        found = self._owner(weight)
        if found is None:
            return
        name, parameter, modules = found
        inside = bool(self._stack) and any(self._stack[-1] is module for module in modules)
        if parameter.ndim < 3:
            self._add((name, -1), x.reshape(-1, x.shape[-1]), inside)
        elif weight.ndim == 3:
            for expert in range(weight.shape[0]):
                self._add((name, expert), x[expert].reshape(-1, x.shape[-1]), inside)
        else:
            self._add((name, (weight.storage_offset() - parameter.storage_offset()) // parameter.stride(0)), x, inside)

    def _add(self, key: Weight, x: Tensor, inside: bool) -> None:
        use = self.uses.setdefault(key, Use())
        x = x.reshape(-1, x.shape[-1]).double()
        use.hessian = x.T @ x if use.hessian is None else use.hessian + x.T @ x
        use.rows, use.calls, use.alone = use.rows + x.shape[0], use.calls + 1, use.alone and inside

    def _owner(self, x: Any) -> tuple[str, Tensor, list[nn.Module]] | None:
        return self._owners.get(x.untyped_storage().data_ptr()) if isinstance(x, Tensor) and x.numel() else None


@contextmanager
def module_stack(stack: list[nn.Module]) -> Iterator[None]:
    """``stack`` holds the modules at work, the innermost last."""

    def leave(module: nn.Module, _: Any, __: Any) -> None:
        stack.pop()

    def enter(module: nn.Module, _: Any) -> None:
        stack.append(module)

    with ExitStack() as hooks:
        hooks.callback(torch_module.register_module_forward_pre_hook(enter).remove)
        hooks.callback(torch_module.register_module_forward_hook(leave, always_call=True).remove)
        yield


def products(model: Any, run: Callable[[], Any]) -> dict[Weight, Use]:
    """Every product of ``run`` with a parameter of ``model``, experts one at a time."""
    _one_expert_at_a_time(model)
    stack: list[nn.Module] = []
    noted = Products(model, stack)
    with torch.no_grad(), module_stack(stack), noted:
        run()
    return noted.uses


def _one_expert_at_a_time(model: Any) -> None:
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_experts_implementation"):
            config._experts_implementation = "eager"


# ---------------------------------------------------------------- blocks


def block_lists(model: nn.Module, run: Callable[[], Any]) -> list[str]:
    """The paths of the lists of modules that hand hidden states on, each in the shape in which it got them."""
    children = {
        id(child): path
        for path, module in reversed(list(model.named_modules()))
        if isinstance(module, (nn.ModuleList, nn.Sequential, nn.ModuleDict))
        for child in module.children()
    }
    kept: dict[str, list[bool]] = {}

    def leave(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        x, y = first_tensor(list(args) + list(kwargs.values())), first_tensor(out)
        states = x is not None and y is not None and x.shape == y.shape and x.is_floating_point() and x.ndim >= 3
        whole = any(p.ndim >= 2 for p in module.parameters()) and not isinstance(module, (nn.Linear, Conv1D))
        kept.setdefault(children[id(module)], []).append(states and whole)

    with ExitStack() as hooks, torch.no_grad():
        for module in model.modules():
            if id(module) in children:
                hooks.callback(module.register_forward_hook(leave, with_kwargs=True).remove)
        run()
    found = [path for path, same in kept.items() if all(same)]
    outer = [path for path in found if not any(path.startswith(f"{other}.") for other in found)]
    numbers = {path: sum(p.numel() for p in model.get_submodule(path).parameters()) for path in outer}
    return [path for path in outer if numbers[path] * 20 >= max(numbers.values())]


def first_tensor(value: Any) -> Tensor | None:
    """The first floating-point tensor of a nest."""
    if isinstance(value, Tensor):
        return value if value.is_floating_point() else None
    items = value.values() if hasattr(value, "values") else value if isinstance(value, (list, tuple)) else ()
    return next((found for found in map(first_tensor, items) if found is not None), None)


# ---------------------------------------------------------------- what quantization should take


@dataclass
class Wanted:
    """What is to be quantized in a model.

    Attributes:
        weights: every matrix that should be, as (parameter, expert).
        kept: name of every other linear's or experts' parameter in the blocks -> why it stays.
        numbers, matrices: how many numbers ``weights`` hold in the type's real size, and all matrices of the blocks but
            those kept by custom.
        twice: weights that are multiplied more than once in a pass.
    """

    blocks: list[str]
    weights: set[Weight] = field(default_factory=set)
    kept: dict[str, str] = field(default_factory=dict)
    numbers: int = 0
    matrices: int = 0
    twice: list[str] = field(default_factory=list)


def wanted(
    model: nn.Module,
    lists: list[str],
    uses: dict[Weight, Use],
    real: dict[str, tuple[int, ...]] | None,
) -> Wanted:
    """What of ``model`` should be quantized, from its products with text.

    Args:
        lists: the paths of its lists of blocks.
        real: the shapes of its parameters in the type's real size.
    """
    found = Wanted(lists)
    owners = {name: module for path, module in model.named_modules() for name in _own(path, module)}
    names = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    real = None if real is None or _is_small(owners, lists, real) else real
    like = {_starred(name): shape for name, shape in (real or {}).items()}  # of layers that only the tiny model has
    for name, parameter in model.named_parameters():
        bias = "bias" in name.rpartition(".")[2]  # of all experts: one row each
        if parameter.ndim < 2 or bias or not any(name.startswith(f"{path}.") for path in lists):
            continue
        shape = (real or {}).get(name, like.get(_starred(name)))
        module, size = owners[name], math.prod(shape or parameter.shape)
        reason = _reason(name, parameter, module, uses, shape)
        reason = reason or (_SHARED if names[id(parameter)] > 1 else "")
        if reason == "":
            fused = [p for p in module.parameters(recurse=False) if p.ndim == 3]
            count = min((len(p) for p in fused), default=0)  # one may have more: of experts that do nothing
            found.weights |= {(name, e) for e in range(count)} if parameter.ndim == 3 else {(name, -1)}
            found.numbers += size
            if uses[_key(name, parameter, uses)].calls > 1 and parameter.ndim == 2:
                found.twice.append(name)
        else:
            found.kept[name] = reason
        if reason not in CUSTOMS and not isinstance(module, (nn.Embedding, nn.modules.conv._ConvNd)):
            found.matrices += size
    return found


_NOT_REACHED, _ELSEWHERE, _NO_LINEAR, _SHARED, _SMALL = (
    "no text reaches it",
    "its weight is read without calling the linear",
    "no linear holds it",
    "several linears are this one weight",
    "a few rows or columns",
)
CUSTOMS = {_SMALL, *(why for _, why in CUSTOM)}


def _starred(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)


def _own(path: str, module: nn.Module) -> list[str]:
    return [f"{path}.{leaf}" if path else leaf for leaf, _ in module.named_parameters(recurse=False)]


def _key(name: str, parameter: Tensor, uses: dict[Weight, Use]) -> Weight:
    return (name, -1) if parameter.ndim == 2 else next((key for key in uses if key[0] == name), (name, 0))


def _reason(
    name: str, parameter: Tensor, module: nn.Module, uses: dict[Weight, Use], real: tuple[int, ...] | None
) -> str:
    """Why a matrix stays in 16 bits; "" where it does not."""
    path = name.rpartition(".")[0]
    linear = isinstance(module, (nn.Linear, Conv1D)) and parameter.ndim == 2 and _multiplies(module)
    experts = parameter.ndim == 3 and ("expert" in f"{path}{type(module).__name__}".lower())
    names = (path, name)
    custom = next((why for pattern, why in CUSTOM if not experts and any(re.search(pattern, n) for n in names)), None)
    if custom is not None:
        return custom
    if not linear and not experts:
        return _NO_LINEAR
    if min((real or parameter.shape)[-2:]) < (FEW if real else 8):
        return _SMALL
    use = uses.get(_key(name, parameter, uses))
    if use is None or not use.calls:
        return _NOT_REACHED if use is None or use.alone else _ELSEWHERE
    return "" if use.alone else _ELSEWHERE


def _multiplies(module: nn.Module) -> bool:
    """Whether a linear, perhaps of a subclass, gives x W^T + b (x W + b of a Conv1D) and nothing else."""
    plain = Conv1D if isinstance(module, Conv1D) else nn.Linear
    if type(module).forward is plain.forward:
        return True
    weight: Any = module.weight
    x = torch.randn(3, 5, weight.shape[0 if plain is Conv1D else 1], generator=torch.Generator().manual_seed(0))
    try:
        return bool(torch.allclose(module(x), plain.forward(module, x), atol=1e-5))  # pyright: ignore
    except (RuntimeError, ValueError, TypeError, IndexError):
        return False


def _is_small(owners: dict[str, nn.Module], lists: list[str], real: dict[str, tuple[int, ...]]) -> bool:
    """Whether the type's defaults are those of a toy: they say nothing of real widths then."""
    linears = [
        min(shape)
        for name, shape in real.items()
        if isinstance(owners.get(name), (nn.Linear, Conv1D)) and len(shape) == 2
        if any(name.startswith(f"{path}.") for path in lists)
    ]
    return bool(linears) and max(linears) < 128

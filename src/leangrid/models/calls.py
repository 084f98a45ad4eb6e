"""The tensors in a call of a block: its hidden states, its other arguments, what it returns."""

from collections.abc import Iterator, Mapping
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from leangrid.models.shape_pass import storage_of

_HIDDEN = ("hidden_states", "x", "inputs", "hidden_state", "hidden")


def hidden_argument(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[str | int, Tensor | None]:
    """The argument as which a block is given its hidden states (a position or a name), and these."""
    if args and isinstance(args[0], Tensor):
        return 0, args[0]
    for key in _HIDDEN:
        if isinstance(kwargs.get(key), Tensor):
            return key, kwargs[key]
    for number, value in enumerate(args):
        if isinstance(value, Tensor) and value.is_floating_point():
            return number, value
    for key, value in kwargs.items():
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 3:
            return key, value
    return 0, None


def first_tensor(value: Any) -> Tensor:
    """The hidden states that a block returned: the tensor, or the first of a tuple. TypeError where there is none."""
    found = find_tensor(value)
    if found is None:
        raise TypeError(f"a block returned {type(value).__name__}, which holds no hidden states")
    return found


def find_tensor(value: Any) -> Tensor | None:
    """As ``first_tensor``; None where there is none."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping):
        value = list(value.values())
    return find_tensor(value[0]) if isinstance(value, list | tuple) and value else None


def moved(value: Any, device: torch.device) -> Any:
    """The same nest of tuples, lists and dicts with its tensors on ``device``."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: moved(item, device) for key, item in value.items()}
    return type(value)(moved(item, device) for item in value) if type(value) in (tuple, list) else value


def place_of(x: Tensor) -> tuple[int, ...]:
    """Which numbers a tensor shows while it lives: its storage, where in it, how many, how wide, how often changed.

    A view with other leading dimensions is the same input."""
    dense = () if x.is_contiguous() else x.stride()
    width = x.shape[-1] if x.ndim else 1
    return storage_of(x), int(x.storage_offset()), x.numel() // max(1, width), width, x._version, *dense


class Digests:
    """What tells tensors from others, found once for a tensor that many blocks are given and none has changed."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Tensor, int, tuple[float, ...]]] = {}  # by its id, which it has while it is held

    def of(self, x: Tensor) -> tuple[float, ...]:
        """Its shape and sums."""
        known = self._known.get(id(x))
        if known is None or known[1] != x._version:
            known = self._known[id(x)] = (x, x._version, _digest(x))
        return known[2]


def other_tensors(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], hidden: str | int, digests: Digests | None = None
) -> dict[str, tuple[float, ...]]:
    """Every tensor of a call but its hidden states, by its place in the arguments, told by shape and sums."""
    digests = Digests() if digests is None else digests
    rest = {str(number): value for number, value in enumerate(args) if number != hidden}
    rest |= {key: value for key, value in kwargs.items() if key != hidden}
    return {path: digests.of(x) for path, x in _nested(rest)}


def argument_versions(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, tuple[Tensor, int]]:
    """Every tensor of a call by its place in the arguments, and how often it was changed so far."""
    return {path: (x, x._version) for path, x in _nested({str(n): value for n, value in enumerate(args)} | {**kwargs})}


def changed_arguments(
    before: Mapping[str, tuple[Tensor, int]], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> list[str]:
    """The places at which a call has changed a tensor, or put another one, since ``argument_versions`` was called."""
    now = argument_versions(args, kwargs)
    both = dict.fromkeys((*before, *now))
    return [path for path in both if not _is_same(before.get(path), now.get(path))]


def _is_same(one: tuple[Tensor, int] | None, other: tuple[Tensor, int] | None) -> bool:
    return one is not None and other is not None and one[0] is other[0] and one[1] == other[1]


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Every tensor in a nest of containers and plain objects."""
    return (x for _, x in _nested(value))


def digest(value: Any) -> dict[str, tuple[float, ...]]:
    """Every tensor in a nest, told by shape and sums."""
    return {path: _digest(x) for path, x in _nested(value)}


def is_alike(one: Any, other: Any) -> bool:
    """Whether two nests have the same tensors, number for number, at the same places."""
    first, second = dict(_nested(one)), dict(_nested(other))
    return first.keys() == second.keys() and all(_same_numbers(x, second[path]) for path, x in first.items())


def _same_numbers(one: Tensor, other: Tensor) -> bool:
    if one is other:
        return True
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one, other) or bool(((one == other) | (one.isnan() & other.isnan())).all())


def copied(value: Any, depth: int = 0) -> Any:
    """The same nest of containers and plain objects, such as caches, with copies of its tensors."""
    if isinstance(value, Tensor):
        return value.clone()
    if type(value) in (tuple, list):
        return type(value)(copied(item, depth + 1) for item in value)
    if isinstance(value, dict):
        new = copy(value)  # of the same class
        new.update((key, copied(item, depth + 1)) for key, item in value.items())
        return new
    if depth < 4 and _is_plain(value):
        new = copy(value)
        vars(new).update((key, copied(item, depth + 1)) for key, item in vars(value).items())
        return new
    return value


def _is_plain(value: Any) -> bool:
    """Whether a value is an object of attributes, no module, class or function."""
    return hasattr(value, "__dict__") and not isinstance(value, nn.Module | type) and not callable(value)


def _digest(x: Tensor) -> tuple[float, ...]:
    if x.is_meta:
        return tuple(map(float, x.shape))
    numbers = torch.view_as_real(x.detach().resolve_conj()) if x.is_complex() else x.detach()  # rope of Llama 4
    flat = torch.nan_to_num(numbers.flatten().double(), 0.0, 1e9, -1e9)
    weights = torch.cos(torch.arange(flat.numel(), dtype=torch.float64))
    return (*map(float, x.shape), float(flat.sum()), float(flat @ weights))


def _nested(value: Any, path: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in a nest of containers and plain objects, such as caches, with its path."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _nested(item, f"{path}.{key}" if path else str(key), depth + 1)
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _nested(item, f"{path}[{number}]", depth + 1)
    elif depth < 4 and _is_plain(value):
        for key, item in vars(value).items():
            if not key.startswith("_"):
                yield from _nested(item, f"{path}.{key}", depth + 1)


def without_numbers(value: Any) -> Any:
    """The nest with its tensors on the meta device: what a block returns, without the numbers."""
    if isinstance(value, Tensor):
        return torch.empty_like(value, device="meta")
    if type(value) in (list, tuple):
        return type(value)(without_numbers(item) for item in value)
    return value


def fill(shape: Any, hidden: Tensor) -> Any:
    """What a block would return, with ``hidden`` as its states and zeros as its other tensors."""
    if type(shape) in (list, tuple) and shape:
        return type(shape)([fill(shape[0], hidden), *(_zeros(item) for item in shape[1:])])
    return hidden


def _zeros(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.zeros(value.shape, dtype=value.dtype)
    return type(value)(_zeros(item) for item in value) if type(value) in (list, tuple) else value

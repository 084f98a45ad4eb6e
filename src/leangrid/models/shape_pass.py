"""A forward pass of a model whose weights are not there: real activations of a few tokens, weights on the meta device.

What a product with an absent weight would give is replaced by numbers of the same shape that depend on its input (and
on nothing random), so that whatever the model decides by values (routing, masks, special tokens) is decided, and two
passes with the same input agree. Nothing larger than a few tokens' activations is allocated, whatever the model's size.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from leangrid.models.experts import modules_outside_experts

_LARGE = 1 << 16  # parameters of more numbers stay absent while the model is looked at
# Taking a part of an absent weight gives an absent weight.
_PARTS = ("index", "index_select", "gather", "select", "slice", "narrow")
_TO = ("_to_copy", "to", "clone", "contiguous", "detach", "alias")


class ShapePass(TorchDispatchMode):
    """While it is entered, operations take meta tensors beside real ones.

    Attributes:
        touched: the storages of absent tensors that were operands, as ``storage_of`` gives them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.touched: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs) if kwargs else {}
        given = _tensors(args, kwargs)
        self.note(func, given, args, kwargs)
        real = [x for x in given if not x.is_meta]
        if len(real) == len(given):
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name in _TO and "device" in kwargs:
            kwargs["device"] = None
        if not real:
            if name in ("equal", "is_nonzero", "_local_scalar_dense"):
                return False if name != "_local_scalar_dense" else 0
            return func(*args, **kwargs)
        empty = _map(_to_meta, args), {key: _map(_to_meta, value) for key, value in kwargs.items()}
        if name in _PARTS and args[0].is_meta:
            return func(*empty[0], **empty[1])
        if func._schema.is_mutable:
            target = args[0]
            if not target.is_meta:
                target.copy_(_numbers(target, real))
            return target
        found = func(*empty[0], **empty[1])
        return _map(lambda x: _numbers(x, real), found)

    def note(self, func: Any, given: list[Tensor], args: Any, kwargs: dict[str, Any]) -> set[int]:
        """Note one operation on the tensors ``given``, which are in ``args`` and ``kwargs``; their storages."""
        storages = {x.untyped_storage()._cdata for x in given}  # storage_of, for thousands of operations
        self.touched |= storages
        return storages


def storage_of(x: Tensor) -> int:
    """A number that tells storages apart while they live, also those of meta tensors."""
    return x.untyped_storage()._cdata


def _map(change: Callable[[Tensor], Any], value: Any) -> Any:
    """The nest of tuples and lists with ``change`` of each of its tensors."""
    if isinstance(value, Tensor):
        return change(value)
    return type(value)([_map(change, item) for item in value]) if type(value) in (tuple, list) else value


def _tensors(args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            found.append(value)
        elif type(value) in (tuple, list):
            _map(found.append, value)
    return found


def _to_meta(x: Tensor) -> Tensor:
    return x if x.is_meta else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


@lru_cache(maxsize=64)
def _tables(width: int) -> tuple[Tensor, Tensor, Tensor]:
    place = torch.arange(width, dtype=torch.float32)
    return torch.cos(place * 0.7), 1.0 + 0.37 * torch.cos(place), 1.7 * place


def _numbers(like: Tensor, real: list[Tensor]) -> Tensor:
    """Numbers in the shape and dtype of ``like``, those of each token from that token's numbers in ``real``."""
    if not like.is_floating_point():
        return torch.zeros(like.shape, dtype=like.dtype)
    width = like.shape[-1] if like.ndim else 1
    source = next((x for x in real if x.is_floating_point() and x.numel()), None)
    tokens = next((x for x in real if x.shape == like.shape[:-1] and not x.is_floating_point()), None)  # an embedding
    if tokens is not None:
        share = tokens.float()
    elif source is None:
        share = torch.zeros(())
    elif source.ndim >= 2 and source.shape[:-1] == like.shape[:-1]:
        share = source.float() @ _tables(source.shape[-1])[0]
    else:
        share = source.float().flatten() @ _tables(source.numel())[0]
    share = torch.nan_to_num(share, 0.0, 0.0, 0.0).float()
    _, slopes, phases = _tables(max(width, 1))
    made = (share[..., None] * slopes).add_(phases)
    made.sub_(made.round()).mul_(2.0)  # between -1 and 1
    return made.expand(like.shape).to(like.dtype).contiguous() if like.ndim else made[0].to(like.dtype)


@contextmanager
def small_parameters(model: nn.Module) -> Iterator[None]:
    """Context: parameters that are small have numbers, so that norms and biases do what they do."""
    absent: list[tuple[nn.Module, str, nn.Parameter]] = []
    made: dict[int, nn.Parameter] = {}
    for _, module in modules_outside_experts(model):
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta and parameter.numel() <= _LARGE:
                absent.append((module, name, parameter))
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(
                        _values(parameter.shape, parameter.dtype).clone(), requires_grad=False
                    )
                module._parameters[name] = made[id(parameter)]
    try:
        yield
    finally:
        for module, name, parameter in absent:
            module._parameters[name] = parameter


@lru_cache(maxsize=16)  # most are norms of one width
def _values(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    if not dtype.is_floating_point:
        return torch.zeros(shape, dtype=dtype)
    place = torch.arange(shape.numel(), dtype=torch.float32)
    scale = 1.0 if len(shape) < 2 else max(1, shape[-1]) ** -0.5  # a layer may have no columns
    return (scale * (0.1 * torch.sin(2.3 * place) + (0.9 if len(shape) < 2 else 0.0))).reshape(shape).to(dtype)

"""What the results of ``quantize``, ``plan``, ``evaluate``, ``compare`` and ``export`` have in common."""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any


class Result(Mapping[str, Any]):
    """Base of the frozen dataclasses that these functions return. They were dicts once, and still read as such."""

    def to_dict(self) -> dict[str, Any]:
        """The object that the command prints with ``--json``: numbers, strings, lists and dicts."""
        return _plain(self)

    def to_json(self) -> dict[str, Any]:
        """The same as ``to_dict``, under its older name."""
        return self.to_dict()

    def __getitem__(self, key: str) -> Any:
        """``result["kl_mean"]`` is ``result.to_dict()["kl_mean"]``."""
        return self.to_dict()[key]

    def __iter__(self) -> Iterator[str]:
        """The keys of ``to_dict``."""
        return iter(self.to_dict())

    def __len__(self) -> int:
        return len(self.to_dict())


_ATOMS = frozenset({str, int, float, bool, type(None)})


def _plain(value: Any) -> Any:
    """What dataclasses.asdict gives, at a fraction of its cost: a plan has tens of thousands of layers."""
    kind = type(value)
    if kind in _ATOMS:
        return value
    names = _fields(kind)
    if names is not None:
        items = [(name, getattr(value, name)) for name in names]
    elif isinstance(value, dict):
        items = value.items()
    else:
        return kind(_plain(item) for item in value) if kind in (list, tuple) else deepcopy(value)
    return {key: item if type(item) in _ATOMS else _plain(item) for key, item in items}


@cache
def _fields(kind: type) -> tuple[str, ...] | None:
    """The names of a dataclass's fields; None for another type."""
    return tuple(one.name for one in fields(kind)) if is_dataclass(kind) else None

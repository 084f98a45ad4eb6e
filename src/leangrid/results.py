"""What the results of ``quantize``, ``plan``, ``evaluate``, ``compare`` and ``export`` have in common."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any


class Result(Mapping[str, Any]):
    """Base of the frozen dataclasses that these functions return. They were dicts once, and still read as such."""

    def to_dict(self) -> dict[str, Any]:
        """The object that the command prints with ``--json``: numbers, strings, lists and dicts."""
        return asdict(self)  # type: ignore[call-overload]

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

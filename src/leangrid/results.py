"""What the results of ``quantize``, ``plan``, ``evaluate``, ``compare`` and ``export`` have in common."""

from dataclasses import asdict
from typing import Any


class Result:
    """Base of the frozen dataclasses that these functions return."""

    def to_dict(self) -> dict[str, Any]:
        """The object that the command prints with ``--json``: numbers, strings, lists and dicts."""
        return asdict(self)  # type: ignore[call-overload]

    def to_json(self) -> dict[str, Any]:
        """The same as ``to_dict``, under its older name."""
        return self.to_dict()

    def __getitem__(self, key: str) -> Any:
        """``result["kl_mean"]`` is ``result.to_dict()["kl_mean"]``: results were dicts once."""
        return self.to_dict()[key]

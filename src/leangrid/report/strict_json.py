"""Values as strict JSON can hold them."""

from collections.abc import Mapping
from typing import Any


def strict(value: Any) -> Any:
    """A value that strict JSON can hold: numbers that are not finite become None."""
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, Mapping):
        return {key: strict(item) for key, item in value.items()}
    return [strict(item) for item in value] if isinstance(value, list | tuple) else value

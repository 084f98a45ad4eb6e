"""Frozen pydantic models whose errors are RecipeError, in one sentence for people."""

import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError, model_validator

from leangrid.errors import RecipeError

_Model = TypeVar("_Model", bound=BaseModel)
_SIZE = re.compile(r"\s*(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[kmgt]?i?)b?\s*", re.IGNORECASE)


class ValidatedModel(BaseModel):
    """A frozen pydantic model that raises RecipeError, in one sentence, for wrong fields in whichever way it is made:
    the constructor, ``model_validate``, ``model_validate_json`` and ``model_copy``."""

    @model_validator(mode="wrap")
    @classmethod
    def _raise_recipe_error(cls, fields: Any, inner: Any) -> Any:
        try:
            return inner(fields)
        except ValidationError as error:
            raise _recipe_error(error, cls) from None

    @classmethod
    def model_validate_json(cls, json_data: str | bytes | bytearray, **options: Any) -> Any:
        """As in pydantic; RecipeError also for text that is not JSON."""
        try:
            return super().model_validate_json(json_data, **options)
        except ValidationError as error:
            raise _recipe_error(error, cls) from None

    def model_copy(self: _Model, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> _Model:
        """A copy with the fields of ``update`` changed, validated as a new object is."""
        return type(self)(**{**dict(self), **(update or {})})


def read_size(text: str) -> int:
    """Bytes of a size such as 5GB (powers of 1000), 700MiB (powers of 1024) or 123456789; ValueError for another
    text."""
    match = _SIZE.fullmatch(text)
    if match is None or match["unit"].lower() == "i":
        raise ValueError("must be bytes, or such as 5GB or 700MiB")
    unit = match["unit"].lower()
    base = 1024 if unit.endswith("i") else 1000
    return int(float(match["number"]) * base ** (" kmgt".index(unit[0]) if unit else 0))


def _recipe_error(error: ValidationError, model: type[BaseModel]) -> RecipeError:
    """The first wrong field as a RecipeError: what is wrong, the value given, and the default or the known fields."""
    first = error.errors(include_url=False)[0]
    name, where = ".".join(str(part) for part in first["loc"]), model.__name__.lower()
    known = f"Fields: {', '.join(model.model_fields)}"
    if first["type"] == "extra_forbidden":
        nearest = get_close_matches(name, model.model_fields, 1)
        hint = f"Did you mean {nearest[0]}? " if nearest else ""
        return RecipeError(f"'{name[:80]}' is no field of a {where}", where, hint + known)
    given = " ".join(repr(first.get("input")).split())
    given = given[:77] + "..." if len(given) > 80 else given
    problem = first["msg"].replace("Input should be", "must be").replace("Value error, ", "")
    problem = f"{name or f'a {where}'}{'' if problem.startswith('must be') else ':'} {problem}"
    field = model.model_fields.get(str(first["loc"][0]) if first["loc"] else "")
    if field is None or field.is_required():
        return RecipeError(f"{problem}, not {given}", where, known)
    described = f": {field.description}" if field.description else ""
    return RecipeError(f"{problem}, not {given}", where, f"The default is {field.default!r}{described}")

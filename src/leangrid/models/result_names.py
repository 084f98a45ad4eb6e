"""Which linear of the model a result's tensors belong to: results have the names of their source (stored.py)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from transformers import PreTrainedModel

from leangrid.models.conversion import Conversion, Described
from leangrid.models.expert_forms import DOWN, FusedForm, form_of
from leangrid.models.linears import linear_shapes
from leangrid.models.naming import Naming
from leangrid.models.stored import StoredTensors

_WEIGHT = ".weight"


@dataclass(frozen=True)
class _Matrix:
    """A tensor as it would be stored if it were not quantized."""

    shape: tuple[int, ...]
    dtype: str = "F32"


def match_result(model: PreTrainedModel, apart: PreTrainedModel, stored: Mapping[str, Described]) -> dict[str, str]:
    """Find the linears of a result's files.

    Args:
        model: as transformers builds it, on the meta device.
        apart: the same with one linear for each matrix of each expert.
        stored: all tensors in the files, by name; those of all experts of a block belong to no linear.

    Returns:
        name in the result -> path in ``apart``, of every linear of which something is stored, in the model's order.
    """
    linears = linear_shapes(apart)
    owners = dict.fromkeys(name.rpartition(".")[0] for name, one in stored.items() if len(one.shape) < 3)
    found = {owner: owner for owner in owners if owner in linears}
    others = [owner for owner in owners if owner and owner not in linears]
    if not others:
        return _ordered(found, linears)
    conversion, parts = Conversion(model, {}), dict[str, _Matrix]()
    forms = {path: form for path, module in model.named_modules() if (form := form_of(module)) is not None}
    for owner in others:
        target, pattern = conversion.renamed(owner + _WEIGHT)
        target = target.removesuffix(_WEIGHT)
        if target in linears:
            if pattern is None:  # else a converter makes several of it, or one of several: none of them is packed
                found[owner] = target
            continue
        path, _, leaf = target.rpartition(".")
        if path in forms:
            parts[owner + _WEIGHT] = _Matrix(_shape(forms[path], leaf))
    if parts:
        merged = Conversion(model, parts)
        sources = {name: one.stored[0] for name, one in merged.sources.items() if not one.converted}
        converted = {name: one for name, one in merged.sources.items() if one.converted}
        places = StoredTensors(apart, Naming(sources, converted=converted, conversion=merged), None, "").places
        for path, place in places.items():
            if path.removesuffix(_WEIGHT) in linears and len(place.stored) == 1:
                found[place.stored[0].removesuffix(_WEIGHT)] = path.removesuffix(_WEIGHT)
    return _ordered(found, linears)


def _ordered(found: dict[str, str], linears: Iterable[str]) -> dict[str, str]:
    position = {path: number for number, path in enumerate(linears)}
    return dict(sorted(found.items(), key=lambda item: position[item[1]]))


def _shape(form: FusedForm, leaf: str) -> tuple[int, int]:
    return form.shape(DOWN) if leaf == DOWN else (form.inner, form.hidden)

"""Under which names a compressed-tensors result holds its tensors, so that plain transformers finds them.

They are the source's names wherever transformers comes from those to its modules, as vLLM and others expect them. What
its quantizer does to the conversion mapping (``HfQuantizer.update_weight_conversions`` and the converter of
``CompressedTensorsHfQuantizer`` for every ``weight``) decides where it does not:

- converters that merge tensors take packed ones too, but then no dense ones;
- converters that cut a tensor apart take no packed ones, and where their sources end in ``.weight`` none is built for
  a config with ``dequantize``, nor for one without if no tensor that is cut from another is packed.

There the module's own name is used, and what is kept dense is stored as the module has it."""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers.core_model_loading import Concatenate, WeightConverter
from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION

from leangrid.models.conversion import Conversion
from leangrid.models.expert_forms import form_of
from leangrid.schemes import Scheme

_WEIGHT, _PACKED = ".weight", ".weight_packed"
METHOD = "compressed-tensors"


@dataclass(frozen=True)
class Kept:
    """How a tensor of the model that is not quantized is stored in the result.

    Attributes:
        names: the names there.
        as_stored: they are the source's tensors, byte for byte; False: it is one tensor, with the model's name and
            layout (``Conversion.read``).
    """

    names: tuple[str, ...]
    as_stored: bool


class ResultNames:
    """Names in a compressed-tensors result.

    Args:
        conversion: of the model as transformers builds it, and the source's tensors.
    """

    def __init__(self, conversion: Conversion) -> None:
        self._conversion = conversion
        # What the quantizer appends: whatever is called weight, in any of its stored forms, becomes a weight.
        general = WeightConverter(["weight", "weight_packed"], "weight", [Concatenate()])
        self._with_packed = conversion.renamer([*conversion.converters, general])
        self._by_pattern = {pattern: one for one in conversion.converters for pattern in one.source_patterns}
        self._cuts = [one for one in conversion.converters if _takes_packed(one) and _cuts(one)]

    def dequantize(self, linears: Iterable[Scheme], experts: Iterable[Scheme] = ()) -> bool:
        """Whether the config may say ``dequantize``, so that transformers makes plain weights of packed ones: it then
        knows one scheme for all linears, and one for all ``experts``, which a target ``re:`` with ``experts`` in it
        names where it is another."""
        return not self._cuts and len(set(linears)) <= 1 and len(set(experts)) <= 1

    def obstacle(self, linears: Mapping[str, Scheme], experts: Iterable[Scheme] = ()) -> str | None:
        """Why plain transformers opens no result with these packed linears, by their paths in the model, and experts;
        None if it does."""
        experts = set(experts)
        if any(not scheme.symmetric for scheme in experts):
            return "it takes no zero points of experts"
        if len(experts) > 1:
            return "it takes one scheme for all experts"
        if self.dequantize(linears.values(), experts):
            return None
        if any(not scheme.symmetric for scheme in linears.values()):
            return "it takes zero points only where all linears have one scheme and none is cut from another"
        scales = "\n".join(f"{module}.weight_scale" for module in linears)
        for one in self._cuts:
            if not re.search(f"{one._original_target_patterns[0]}_scale$", scales, re.MULTILINE):
                return f"it cannot cut '{one.source_patterns[0]}' apart beside packed tensors, none of them cut from it"
        return None

    def packed(self, module: str, wished: str | None = None) -> str | None:
        """The name under which the packed tensors of the linear at the path ``module`` in the model are stored, as in
        ``<name>.weight_packed``: ``wished`` (None: the source's), or the module's own; None where transformers finds
        neither."""
        names = (self._conversion.stored_module_name(module) if wished is None else wished, module)
        return next((one for one in names if one is not None and self._found(one + _PACKED) == module + _WEIGHT), None)

    def takes_expert(self, stored: str, experts: str) -> bool:
        """Whether transformers finds the packed tensors ``<stored>.weight_packed`` of one matrix of an expert, and
        makes them a part of the experts at the path ``experts`` in the model."""
        target, pattern = self._conversion.renamed(stored + _WEIGHT)
        if pattern is None:
            return target.startswith(f"{experts}.") and self.replaces_experts(experts)
        converter = self._by_pattern[pattern]
        single = len(converter.target_patterns) == 1 and _takes_packed(converter)
        path, _, leaf = target.rpartition(".")
        return single and path == experts and self._is_filled(experts, leaf)

    def _is_filled(self, experts: str, leaf: str) -> bool:
        """Whether the experts that have matrices fill the tensor ``leaf`` of the module at the path ``experts``, which
        may have room for others that do nothing: packed ones leave it empty."""
        module = self._conversion.module(experts)
        form, tensor = (None, None) if module is None else (form_of(module), module._parameters.get(leaf))
        return form is None or tensor is None or len(tensor) == form.count

    def replaces_experts(self, path: str) -> bool:
        """Whether transformers opens the experts at ``path`` in the model with one linear for each matrix."""
        module = self._conversion.module(path)
        return module is not None and experts_apart(module) is not None

    def kept(self, name: str, packed: Collection[str] = ()) -> Kept | None:
        """How the model's tensor ``name`` is stored that is not quantized, beside the packed linears of the modules
        ``packed``; None where transformers does not find it there. Raises KeyError for a name that the source does not
        have."""
        source = self._conversion.sources[name]
        converter = self._conversion.converter(name)
        if converter is None:
            as_stored = self._found(source.stored[0]) == name
        else:  # a tensor that is cut apart stays whole only if no part of it is packed under a name of its own
            parts = self._conversion.made_of(source.stored[0])
            as_stored = not _takes_packed(converter) and not any(one.removesuffix(_WEIGHT) in packed for one in parts)
        if as_stored:
            return Kept(source.stored, True)
        return Kept((name,), False) if self._found(name) == name else None

    def _found(self, stored: str) -> str | None:
        """The model's tensor that a result's ``stored`` is read for; None where a converter of the model takes it."""
        target, pattern = self._conversion.renamed(stored, self._with_packed)
        return target if pattern in (None, "weight", "weight_packed") else None


def experts_apart(experts: Any) -> type | None:
    """The module with a linear for each matrix of each expert by which transformers replaces ``experts`` when it opens
    a quantized result; None where it keeps them. Its names are then the result's, quantized or not."""
    row = MODULES_TO_PATCH_FOR_QUANTIZATION.get(type(experts).__name__)
    methods = {str(getattr(method, "value", method)) for method in row["quantization_methods"]} if row else set()
    return row["module_name"] if row and METHOD in methods else None


def _takes_packed(converter: WeightConverter) -> bool:
    """Whether the quantizer lets a converter take packed tensors in place of dense ones: its sources are weights."""
    return all(pattern.endswith(_WEIGHT) for pattern in converter._original_source_patterns)


def _cuts(converter: WeightConverter) -> bool:
    """Whether a converter makes several tensors of one: with several sources, as it gets for packed ones, it is refused
    (``WeightConverter.__init__``)."""
    many = any(getattr(operation, "supports_many_to_many", False) for operation in converter.operations)
    return len(converter.target_patterns) > 1 and not many

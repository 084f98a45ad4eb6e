"""Where each tensor of a skeleton's model is stored, and under which name the result holds it.

A skeleton's model has one linear for each matrix of each expert (experts.py); the checkpoint has them so, or all
experts of a block in one tensor, and some tensors under other names or in other pieces (naming.py, conversion.py).

The result holds each tensor under the source's name, or where plain transformers would not find it there, packed or
beside packed ones, under its module's (conversion_names.py). Experts of which none is quantized stay in the tensors of
all experts in which the source has them; where plain transformers drops their single matrices beside packed ones, they
are put into those of its model."""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Set
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel

from leangrid.models.conversion import Conversion, Described, ExpertPart, Source
from leangrid.models.conversion_names import ResultNames
from leangrid.models.expert_forms import GATE, UP, FusedForm, form_of
from leangrid.models.experts import Experts, mixtures_in
from leangrid.models.linears import is_linear
from leangrid.models.naming import Naming, Weights

_WEIGHT = ".weight"
MIXTRAL = ("w1", "w3", "w2")  # what Mixtral's checkpoints call gate, up and down
_KINDS = ("weight", "bias")


class Place(NamedTuple):
    """Where one tensor of the model is.

    Attributes:
        stored: the names of the stored tensors that it is made of.
        name: under which the result holds it where it is not quantized.
        expert: the entry of the stored tensor, which holds those of all experts; None where it does not.
        take: makes the model's tensor of what is stored (of the ``expert``); None: it is that.
        converted: the name in transformers' model of the tensor that has to be converted first; None: nothing has to.
    """

    stored: tuple[str, ...]
    name: str
    expert: int | None = None
    take: Callable[[Tensor], Tensor] | None = None
    converted: str | None = None

    @property
    def is_whole(self) -> bool:
        """Whether it is one stored tensor as it is."""
        return self.expert is None and self.take is None and self.converted is None


class StoredTensors:
    """The tensors of a model by their names in it.

    Args:
        model: the skeleton's.
        naming: of the model as transformers builds it.
        checkpoint: the files; None where only names are asked for.
        base_prefix: the path of the base model in the model, with which names may be stored or not.

    Attributes:
        places: name in the model -> where it is.
        idle: path of a mixture -> stored tensors of experts that it takes and does not compute with.
        result_names: what plain transformers finds in a result; None where nothing is known of its mapping.
        not_found: the paths of linears that plain transformers would not find packed, under any name.
    """

    def __init__(self, model: nn.Module, naming: Naming, checkpoint: Weights | None, base_prefix: str) -> None:
        self._naming, self._checkpoint, self._prefix = naming, checkpoint, base_prefix
        self._mixtral = getattr(getattr(model, "config", None), "model_type", None) == "mixtral"
        self._entry: tuple[tuple[str, int], Tensor] | None = None  # the last expert's part of a stored tensor
        self._converted: tuple[str, Tensor] | None = None  # the last, of which several parts may be asked for
        self.result_names = None if naming.conversion is None else ResultNames(naming.conversion)
        self._renames = any(self._is_renamed(name, stored) for name, stored in naming.sources.items())
        self._packed: dict[str, str] = {}  # path of a linear -> its name in the result, where that is not its weight's
        self.places: dict[str, Place] = {}
        self._forms: dict[str, FusedForm] = {}  # path of a mixture -> how transformers' model holds it
        self._of_all: dict[str, Place] = {}  # the tensors of all experts in that model
        self.idle: dict[str, dict[str, None]] = {}
        for name, stored in naming.sources.items():
            self.places[name] = Place((stored,), self._spelled(name, stored))
        for name, source in naming.converted.items():
            self.places[name] = Place(source.stored, name, converted=name)
        direct = {} if naming.conversion is None else naming.conversion.unread
        if direct:
            names = {name for name, _ in model.named_parameters()}
            for path, mixture in mixtures_in(model).items():
                names |= {f"{path}.{name}" for name in mixture.parameter_names()}
            names -= self.places.keys()
            self.places |= {
                name: Place((own,), self._spelled(name, own)) for own, name in direct.items() if name in names
            }
        mixtures = mixtures_in(model)
        for path, module in mixtures.items():
            self._forms[path] = module.form
            self._place_experts(path, module)
        self.not_found = frozenset(self._name_linears(model, mixtures))

    def place(self, name: str) -> Place:
        """Where the tensor is that the model calls ``name``, or transformers' model, which has all experts in one."""
        return self.places.get(name) or self._of_all[name]

    def read(self, name: str) -> Tensor:
        """The tensor that the model calls ``name``, or transformers' model, in the stored dtype."""
        place, conversion = self.place(name), self._naming.conversion
        if self._checkpoint is None:
            raise RuntimeError("nothing can be read without a checkpoint")
        if place.converted is not None and conversion is not None:
            kept = self._converted
            if kept is None or kept[0] != place.converted:
                kept = self._converted = (place.converted, conversion.read(place.converted, self._checkpoint.read))
            found = kept[1] if place.expert is None else kept[1][place.expert]
        elif place.expert is not None:
            found = self._read_expert(place.stored[0], place.expert)
        else:
            found = self._checkpoint.read(place.stored[0])
        return found if place.take is None else place.take(found).contiguous()

    def _read_expert(self, stored: str, expert: int) -> Tensor:
        """One expert's part of a stored tensor. The last is kept: gate and up are the two halves of one part."""
        kept = self._entry
        if kept is None or kept[0] != (stored, expert):
            entry: Any = getattr(self._checkpoint, "read_entry", None)
            whole: Any = self._checkpoint
            kept = ((stored, expert), whole.read(stored)[expert] if entry is None else entry(stored, expert))
            self._entry = kept
        return kept[1]

    def forget(self) -> None:
        """Let go of what was kept of the last tensors that were read in parts."""
        self._entry = self._converted = None

    def dtype(self, name: str) -> str:
        """The dtype in which it is stored, as safetensors calls it."""
        return "" if self._checkpoint is None else self._checkpoint.tensors[self.places[name].stored[0]].dtype

    def copied(
        self, names: Iterable[str], quantized: Collection[str], merge: bool = False
    ) -> Iterator[tuple[str, str | None]]:
        """What the result holds of the tensors ``names`` of the model that are not ``quantized``: the name there, and
        the model's name of it, or None for a stored tensor that is copied under its own name because the model has it
        in other pieces. ``merge``: experts that all stay are put together where plain transformers finds them so
        alone."""
        packed = {name.removesuffix(_WEIGHT) for name in quantized}
        gone = {stored for name in quantized for stored in self.places[name].stored}
        # Of each mixture: what is held of it, where that is tensors of all experts.
        whole: dict[str, list[tuple[str, str | None]] | None]
        whole = dict.fromkeys(name.rsplit(".", 2)[0] for name in packed)
        met, seen = set[str](), set[str]()
        for name in names:
            path = name.rsplit(".", 3)[0]
            if path in self._forms and path not in met:
                met.add(path)
                if path not in whole:
                    whole[path] = self.kept_whole(path, merge)
                if whole[path] is None:
                    yield from ((stored, None) for stored in self.idle.get(path, ()))
            mixture = whole.get(path)
            if mixture is None:
                mixture = () if name in quantized else self._kept(name, packed, gone)
            for kept, own in mixture:
                if kept not in seen:
                    seen.add(kept)
                    yield kept, own

    def kept_whole(self, path: str, merge: bool) -> list[tuple[str, str | None]] | None:
        """What ``copied`` gives for the experts at ``path``, none of which is quantized, where the result holds them in
        tensors of all experts; None where it holds them one by one."""
        names, conversion = self.result_names, self._naming.conversion
        if names is not None and names.replaces_experts(path):
            return None
        found: list[tuple[str, str | None]] = []
        for fused in sorted(self._forms[path].fused_names):
            name = f"{path}.{fused}" if path else fused
            place = self._of_all.get(name)
            if place is None:
                return None
            apart = len(place.stored) > 1
            if apart and not (merge and conversion is not None and conversion.made_of(place.stored[0]) == (name,)):
                return None  # nor where they are also parts of other experts' tensors, which may be quantized
            kept = None if names is None else names.kept(name)
            if kept is not None and not kept.as_stored:
                found.append((name, name))
            elif apart:
                return None
            else:
                found += [(place.name, name)] if place.is_whole else [(stored, None) for stored in place.stored]
        return found

    @property
    def fused_mixtures(self) -> list[str]:
        """The paths of the mixtures whose experts are stored in tensors of all experts."""
        read_in_parts = {name.rsplit(".", 3)[0] for name, place in self.places.items() if place.expert is not None}
        return [path for path in self._forms if path in read_in_parts]

    def _kept(self, name: str, packed: Collection[str], gone: Set[str]) -> list[tuple[str, str | None]]:
        """What ``copied`` gives for one tensor, beside the ``packed`` linears made of the stored tensors ``gone``."""
        place = self.places[name]
        if place.expert is not None:
            return [(place.name, name)]
        conversion, as_stored = self._naming.conversion, True
        if conversion is not None and self.result_names is not None and name in conversion.sources:
            kept = self.result_names.kept(name, packed)
            as_stored = kept is not None and kept.as_stored
        if not as_stored or not gone.isdisjoint(place.stored):
            return [(name, name)]
        return [(place.name, name)] if place.is_whole else [(stored, None) for stored in place.stored]

    def module_name(self, path: str) -> str:
        """The name that the result gives to the linear at ``path`` in the model."""
        place = self.places.get(path + _WEIGHT)
        return self._packed.get(path) or (path if place is None else place.name.removesuffix(_WEIGHT))

    def _name_linears(self, model: nn.Module, mixtures: Collection[str]) -> Iterator[str]:
        """Choose the names of packed linears that are no experts'; the paths of those that transformers would not
        find."""
        conversion = self._naming.conversion
        if conversion is None or self.result_names is None or not (self._renames or conversion.converters):
            return  # its names are the model's
        for path, module in model.named_modules():
            place = self.places.get(path + _WEIGHT)
            if place is None or not is_linear(module) or path.rsplit(".", 2)[0] in mixtures:
                continue
            wished = place.name.removesuffix(_WEIGHT) if place.name.endswith(_WEIGHT) else path
            name = self.result_names.packed(path, wished)
            if name is None:
                yield path
            self._packed[path] = name or path

    def _place_experts(self, path: str, module: Experts) -> None:
        """The linears of the experts at ``path``, whose tensors transformers' model holds fused."""
        form, conversion, dot = module.form, self._naming.conversion, f"{path}." if path else ""
        parts_of: dict[str, tuple[ExpertPart, ...] | None] = {}
        for kind in ("weight", "bias") if form.biased else ("weight",):
            for leaf in dict.fromkeys(leaf for leaves in form.stages for leaf in leaves):
                fused = f"{dot}{form.fused_name(leaf, kind)}"
                whole = self.places.get(fused)
                if whole is None or f"{dot}0.{leaf}.{kind}" in self.places:  # stored under the linears' own names
                    continue
                if fused not in parts_of:
                    converted = None if whole.converted is None else conversion
                    parts_of[fused] = None if converted is None else converted.expert_parts(fused)
                if (parts := parts_of[fused]) is not None:
                    self._place_parts(dot, leaf, kind, parts, form)
                    continue
                held = whole.stored[0] if whole.converted is not None and len(whole.stored) == 1 else whole.name
                owner, _, last = held.rpartition(".")
                if last != form.fused_name(leaf, kind):  # stored under another name: the linears have the model's
                    owner = path
                take = form.taken(leaf, kind)
                for expert in range(form.count):
                    name = self._saved(f"{owner}.{expert}.{leaf}.{kind}" if owner else f"{expert}.{leaf}.{kind}")
                    place = Place(whole.stored, name, expert, take, whole.converted)
                    self.places[f"{dot}{expert}.{leaf}.{kind}"] = place
        for fused in {form.fused_name(leaf, kind) for leaves in form.stages for leaf in leaves for kind in _KINDS}:
            if (whole := self.places.pop(f"{dot}{fused}", None)) is not None:
                self._of_all[f"{dot}{fused}"] = whole

    def _place_parts(self, dot: str, leaf: str, kind: str, parts: tuple[ExpertPart, ...], form: FusedForm) -> None:
        count, transposed = form.count, form.transposed
        wanted = 1 if leaf == UP and any(part.part for part in parts) else 0
        for stored, expert, number, _, _, turned in parts:
            if expert >= count:  # room that the model's tensor has for experts that do nothing
                self.idle.setdefault(dot.removesuffix("."), {})[stored] = None
            elif number == wanted or leaf not in (GATE, UP):
                take = Tensor.t if turned != transposed and kind == "weight" else None
                self.places[f"{dot}{expert}.{leaf}.{kind}"] = Place((stored,), stored, None, take)

    def _spelled(self, name: str, stored: str) -> str:
        """The result's name of a tensor that is stored whole: the checkpoint's, but the model's where that belongs to
        another tensor (tied ones), or where old spellings and the base model's prefix are all that differs in the whole
        checkpoint."""
        conversion = self._naming.conversion
        others = conversion is not None and conversion.sources.get(name) != Source((stored,))
        if others and name in self._naming.sources:
            return self._saved(name)
        return stored if self._renames or not self._is_respelled(name, stored) else self._saved(name)

    def _is_renamed(self, name: str, stored: str) -> bool:
        """Whether transformers' mapping for this model gives the stored tensor another name."""
        conversion = self._naming.conversion
        found = conversion is not None and conversion.sources.get(name) == Source((stored,))
        return found and not self._is_respelled(name, stored)

    def _is_respelled(self, name: str, stored: str) -> bool:
        base = f"{self._prefix}." if self._prefix else ""
        old = stored.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        return name in (old, base + old, old.removeprefix(base))

    def _saved(self, name: str) -> str:
        """As Mixtral's checkpoints call a tensor of its experts where this one was saved otherwise."""
        return mixtral_name(name) if self._mixtral else name


def mixtral_name(name: str) -> str:
    """As Mixtral's checkpoints call what transformers' model calls ``name``, wholly or in its last part."""
    if not (".mlp." in name or ".block_sparse_moe." in name):
        return name
    for ours, theirs in zip(("gate_proj", "up_proj", "down_proj"), MIXTRAL, strict=True):
        name = name.replace(f".{ours}.", f".{theirs}.")
    return name.replace(".mlp.", ".block_sparse_moe.")


def stores_experts_apart(model: PreTrainedModel, stored: Mapping[str, Any]) -> bool:
    """Whether a checkpoint holds the experts' matrices under the names that our linears have, where transformers does
    not merge such matrices itself. ``model`` is as transformers builds it."""
    forms = {path: form for path, module in model.named_modules() if (form := form_of(module)) is not None}
    ours = tuple(f"{path}.0.{form.leaves[-1]}." for path, form in forms.items())
    likely = {f"{path.rpartition('.')[2]}.0.{form.leaves[-1]}." for path, form in forms.items()}
    holds = re.compile("|".join(map(re.escape, sorted(likely)))).search
    some = {name: one for name, one in stored.items() if holds(f".{name}")} if likely else {}
    return bool(some) and any(name.startswith(ours) for name in Conversion(model, some).unread.values())


def merged_mixtures(model: PreTrainedModel, stored: Mapping[str, Described]) -> frozenset[str]:
    """The paths of the mixtures whose matrices a checkpoint holds in tensors of all experts. ``model`` is as
    transformers builds it."""
    forms = {path: form for path, module in model.named_modules() if (form := form_of(module)) is not None}
    several = {name: one for name, one in stored.items() if len(one.shape) > 2} if forms else {}
    found = Conversion(model, several).sources if several else {}
    return frozenset(
        path for path, form in forms.items() if all(f"{path}.{form.fused_name(leaf)}" in found for leaf in form.leaves)
    )

"""How the tensors of a checkpoint become the tensors of a model, by transformers' own conversion mapping.

The names that a checkpoint stores are not always those of today's modules: parts are renamed, the matrices of experts
merged into one tensor, fused projections cut apart, rows permuted for another order of rotary pairs. transformers keeps
what it does for each model (``get_model_conversion_mapping``) and applies it to every tensor while it loads
(``core_model_loading``). ``Conversion`` applies the same objects to names and shapes alone, before a weight is read,
and says for every tensor of the model which stored ones it is made of, and which rows are which."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from leangrid.errors import first_line
from leangrid.models.conversion_map import Placement, Shape, trace
from leangrid.models.renaming import Renamer
from leangrid.storage.dtypes import plain_dtype

_WEIGHT = ".weight"
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")  # of a block, in a name


@runtime_checkable
class Described(Protocol):
    """What is known of a stored tensor before it is read; ``dtype`` as safetensors names it."""

    @property
    def shape(self) -> Sequence[int]: ...
    @property
    def dtype(self) -> str: ...


@dataclass(frozen=True)
class Source:
    """How a tensor of the model is read.

    Attributes:
        stored: the names of the stored tensors that it is made of, in the order in which they are converted. Where
            several tensors of the model are cut from one, each names that one.
        converted: whether operations are applied; False: it is the one stored tensor, under its name.
        operations: the names of transformers' operations, such as ``("MergeModulelist", "Concatenate")``.
    """

    stored: tuple[str, ...]
    converted: bool = False
    operations: tuple[str, ...] = ()


class ExpertPart(NamedTuple):
    """One matrix of one expert, stored as a tensor of its own.

    ``model[expert][rows][:, cols]`` is ``stored``, or its transpose. In the tensor of gate and up together, ``part`` 0
    is the one whose rows (columns) come first; in a tensor of one kind of matrix it is 0.
    """

    stored: str
    expert: int
    part: int
    rows: Tensor
    cols: Tensor
    transposed: bool


class _Converted:
    """One application of one of transformers' converters: stored tensors in, tensors of the model out."""

    def __init__(self, converter: WeightConverter, target: str, model: PreTrainedModel) -> None:
        self.converter, self.target, self.model = converter, target, model
        self.patterns: list[str] = []
        self.names: list[str] = []
        self.shapes: list[Shape] = []

    def add(self, pattern: str, name: str, shape: Sequence[int]) -> None:
        self.patterns.append(pattern)
        self.names.append(name)
        self.shapes.append(tuple(shape))

    def convert(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """The tensors of the model by name, made of the stored ones in the order of ``names``."""
        mapping = deepcopy(self.converter)  # it collects tensors and releases them
        for pattern, name, tensor in zip(self.patterns, self.names, tensors, strict=True):
            mapping.add_tensor(self.target, name, pattern, tensor)  # pyright: ignore[reportArgumentType]
        seen = _Shortened(self.model, {real: tuple(t.shape) for real, t in zip(self.shapes, tensors, strict=True)})
        made = mapping.convert(self.target, model=seen, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def kind(self, shape: Shape, place: int) -> tuple[object, ...]:
        """What the placements of its output number ``place`` depend on, beside names."""
        return (id(self.converter), tuple(zip(self.patterns, self.shapes, strict=True)), shape, place)


class _Shortened:
    """The model as an operation sees it while axes are cut short (conversion_map.py): a parameter that is shaped like
    a stored tensor stays so, since operations compare the two."""

    def __init__(self, model: PreTrainedModel, shapes: Mapping[Shape, Shape]) -> None:
        self._model, self._shapes = model, shapes

    def get_parameter(self, name: str) -> Tensor:
        parameter = self._model.get_parameter(name)
        shape = self._shapes.get(tuple(parameter.shape), tuple(parameter.shape))
        return torch.empty(shape, dtype=parameter.dtype, device="meta")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class Conversion:
    """Which stored tensors are which of a model's.

    Args:
        model: on the meta device, as transformers builds it; its experts may be replaced by linears of their own where
            the checkpoint stores them under those linears' names.
        stored: the tensors of the checkpoint by name.

    Attributes:
        sources: name in the model -> how it is read, for every tensor of its ``state_dict`` that is found.
        shapes: name in the model -> the shape that is read, of the same tensors.
        unread: stored name -> the name that it would have in the model, of stored tensors that the model does not have.
        converters: transformers' converters for this model.
        failed: name in the model -> one sentence, of tensors whose stored parts cannot be converted.
        parts: name in the model -> the stored tensors that transformers would convert to it (and others).
    """

    def __init__(self, model: PreTrainedModel, stored: Mapping[str, Described]) -> None:
        self._model = model
        self._state: dict[str, Any] = model.state_dict(keep_vars=True)
        transforms = get_model_conversion_mapping(model)
        self._renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
        self.converters = [one for one in transforms if isinstance(one, WeightConverter)]
        self._renamer = Renamer(self._renamings, self.converters)
        self._spelled: dict[str, str] = {}  # renamed name -> with the base model's prefix or without it
        self._made: dict[str, tuple[_Converted, int]] = {}
        self._placed: dict[tuple[object, ...], tuple[Placement, ...] | None] = {}
        self._parts: dict[tuple[object, ...], tuple[ExpertPart, ...]] = {}
        self._known: dict[tuple[object, ...], tuple[str, dict[str, Shape]]] = {}
        self._made_of: dict[str, list[str]] | None = None
        self.sources: dict[str, Source] = {}
        self.shapes: dict[str, Shape] = {}
        self.unread: dict[str, str] = {}
        self.failed: dict[str, str] = {}
        self.parts: dict[str, tuple[str, ...]] = {}
        for group in self._assign(stored):
            self.parts[group.target] = tuple(group.names)
            self._convert_shapes(group, stored)

    def _assign(self, stored: Mapping[str, Described]) -> Iterable[_Converted]:
        """Find the tensor of the model that each stored one belongs to, in the order in which transformers loads."""
        by_pattern = {pattern: one for one in self.converters for pattern in one.source_patterns}
        groups: dict[str, _Converted] = {}
        for name in sorted(stored, key=_loading_order):
            target, pattern = self.renamed(name)
            if target not in self._state:
                self.unread[name] = target
            elif pattern is not None:
                group = groups.setdefault(target, _Converted(by_pattern[pattern], target, self._model))
                group.add(pattern, name, stored[name].shape)
            elif target not in self.sources or name == target:
                self.sources[target], self.shapes[target] = Source((name,)), tuple(stored[name].shape)
        return groups.values()

    def renamed(self, name: str, renamer: Renamer | None = None) -> tuple[str, str | None]:
        """The model's name for a tensor that a checkpoint calls ``name``, and the pattern of the converter that takes
        it, None where none does (transformers' ``convert_and_load_state_dict_in_model``). ``renamer``: of other
        converters than the model's."""
        target, pattern = (renamer or self._renamer)(name)
        target = self._prefixed(target)
        if target not in self._state and name in self._state:  # it has today's name already
            return self._prefixed(name), None
        return target, pattern

    def _prefixed(self, name: str) -> str:
        """A renamed name with the base model's prefix, or without it, as the model has it."""
        if name not in self._spelled:
            self._spelled[name], _ = rename_source_key(name, [], [], self._model.base_model_prefix, self._state)
        return self._spelled[name]

    def renamer(self, converters: Sequence[WeightConverter]) -> Renamer:
        """The model's renamings with these converters instead of its own."""
        return Renamer(self._renamings, converters)

    def _convert_shapes(self, group: _Converted, stored: Mapping[str, Described]) -> None:
        """Note what a converter makes of its stored tensors."""
        operations = tuple(type(one).__name__ for one in group.converter.operations)
        try:
            made = self._made_shapes(group, stored)
        except MemoryError:
            raise
        except Exception as error:  # operations are code of transformers, and of whoever registers a mapping there
            shown = f"'{group.names[0]}'" + (f" and {len(group.names) - 1} more" if len(group.names) > 1 else "")
            self.failed[group.target] = f"{shown} cannot be converted ({', '.join(operations)}): {first_line(error)}"
            return
        for place, (name, shape) in enumerate(made.items()):
            if name in self._state and name not in self.sources:
                self._made[name] = (group, place)
                self.sources[name] = Source(tuple(group.names), True, operations)
                self.shapes[name] = shape

    def _made_shapes(self, group: _Converted, stored: Mapping[str, Described]) -> dict[str, Shape]:
        """The tensors of the model that a converter makes, by converting tensors without numbers; of blocks that are
        alike those of one, under the other's number."""
        wanted = tuple(self._state[group.target].shape)
        kind = (*group.kind(wanted, 0), _NUMBER.sub("#", group.target), tuple(stored[n].dtype for n in group.names))
        numbers = _NUMBER.findall(group.target)
        if kind in self._known:
            example, made = self._known[kind]
            if all(_NUMBER.findall(name) == _NUMBER.findall(example) for name in made):
                return {_numbered(name, numbers): shape for name, shape in made.items()}
        empty: dict[tuple[Shape, str], Tensor] = {}
        for name, shape in zip(group.names, group.shapes, strict=True):
            dtype = stored[name].dtype
            if (shape, dtype) not in empty:
                empty[shape, dtype] = torch.empty(shape, dtype=plain_dtype(dtype) or torch.float32, device="meta")
        tensors = [empty[shape, stored[name].dtype] for name, shape in zip(group.names, group.shapes, strict=True)]
        made = {name: tuple(value.shape) for name, value in group.convert(tensors).items()}
        self._known.setdefault(kind, (group.target, made))
        return made

    def read(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        """The tensor that the model calls ``name``, in the stored dtype, from stored tensors that ``read`` gives by
        name. Raises KeyError for a name that is not in ``sources``."""
        source = self.sources[name]
        if not source.converted:
            return read(source.stored[0])
        return self._made[name][0].convert([read(one) for one in source.stored])[name]

    def converter(self, name: str) -> WeightConverter | None:
        """transformers' converter that makes the model's tensor ``name``; None where it is stored as it is."""
        made = self._made.get(name)
        return None if made is None else made[0].converter

    def made_of(self, stored: str) -> tuple[str, ...]:
        """The names in the model of the tensors that are made of the stored tensor ``stored``, or of parts of it."""
        if self._made_of is None:
            self._made_of = {}
            for name, source in self.sources.items():
                for one in source.stored:
                    self._made_of.setdefault(one, []).append(name)
        return tuple(self._made_of.get(stored, ()))

    def placements(self, name: str) -> tuple[Placement, ...] | None:
        """Where the numbers of its stored tensors lie in the tensor that the model calls ``name``; None where that is
        no grid of rows and columns. Raises KeyError for a name that is not in ``sources``."""
        source = self.sources[name]
        if not source.converted:
            whole = tuple(torch.arange(n) for n in self.shapes[name])
            return (Placement(source.stored[0], tuple(range(len(whole))), whole, whole),)
        group, _ = self._made[name]
        placed = self._placed_alike(name)
        if placed is None:
            return None
        return tuple(Placement(group.names[int(one.stored)], one.order, one.at, one.taken) for one in placed)

    def _placed_alike(self, name: str) -> tuple[Placement, ...] | None:
        """What ``placements`` gives for a converted tensor, with the numbers of its stored tensors for their names: it
        is found once for all that are alike."""
        group, place = self._made[name]
        kind = group.kind(self.shapes[name], place)
        if kind not in self._placed:
            numbers = [str(index) for index in range(len(group.names))]
            self._placed[kind] = trace(
                lambda tensors: list(group.convert(tensors).values())[place], numbers, group.shapes, self.shapes[name]
            )
        return self._placed[kind]

    def expert_parts(self, name: str) -> tuple[ExpertPart, ...] | None:
        """The stored matrices of which the model's tensor of all experts ``name`` is made, expert after expert; None
        where they are not stored one an expert: then ``sources`` names the tensor that holds them all."""
        if not self.sources[name].converted:
            return None
        (group, place), placed = self._made[name], self._placed_alike(name)
        if placed is None or len(self.shapes[name]) != 3 or any(one.order[0] is not None for one in placed):
            return None
        kind = group.kind(self.shapes[name], place)
        if kind not in self._parts:
            self._parts[kind] = tuple(_expert_parts(placed))
        return tuple(
            ExpertPart(group.names[int(one.stored)], one.expert, one.part, one.rows, one.cols, one.transposed)
            for one in self._parts[kind]
        )

    def module(self, path: str) -> torch.nn.Module | None:
        """The module at ``path`` in the model; None where it has none."""
        try:
            return self._model.get_submodule(path)
        except AttributeError:
            return None

    def rename_to_module(self, stored_module: str) -> str:
        """The path in the model of the module that the checkpoint calls ``stored_module``, both without ``.weight``.
        For a module whose weight is converted, the first of those that it becomes a part of."""
        target, _ = self.renamed(stored_module + _WEIGHT)
        return target.removesuffix(_WEIGHT)

    def stored_module_name(self, module: str) -> str | None:
        """The name in the checkpoint of the module at the path ``module`` in the model; None where its weight is not
        one stored tensor ``<name>.weight``."""
        source = self.sources.get(module + _WEIGHT)
        if source is None or source.converted or not source.stored[0].endswith(_WEIGHT):
            return None
        return source.stored[0].removesuffix(_WEIGHT)


def _loading_order(name: str) -> list[object]:
    """``dot_natural_key`` of a stored name, by which transformers sorts names before it loads them: that of its
    parts, which many names share."""
    return [_part_order(part) for part in name.split(".")]


@lru_cache(maxsize=4096)
def _part_order(part: str) -> object:
    (key,) = dot_natural_key(part)
    return key


def _expert_parts(placed: Sequence[Placement]) -> Iterator[ExpertPart]:
    """The parts of a tensor of all experts, expert after expert, each from one stored tensor."""
    count: dict[int, int] = {}
    for one in sorted(placed, key=lambda one: [int(indices[0]) for indices in one.at]):
        expert = int(one.at[0][0])
        part = count[expert] = count.get(expert, -1) + 1
        yield ExpertPart(one.stored, expert, part, one.at[1], one.at[2], one.order[1:] == (1, 0))


def _numbered(name: str, numbers: Sequence[str]) -> str:
    """``name`` with its numbers replaced by ``numbers``, one after the other."""
    left = iter(numbers)
    return _NUMBER.sub(lambda _: next(left), name)

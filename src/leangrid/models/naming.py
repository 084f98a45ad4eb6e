"""Which tensor of a checkpoint is which of the model: found by name through transformers' conversion mapping
(conversion.py), compared in shape and dtype, tied as transformers ties them.

What a checkpoint holds beside the model (a layer that predicts further tokens, the head of another task) is copied to
the result under its own name. A tensor inside of the model's own modules that the model does not have is refused."""

import re
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from leangrid.errors import CheckpointError
from leangrid.models.conversion import Conversion, Source
from leangrid.storage.dtypes import FLOATS
from leangrid.storage.foreign import OLD_BUFFERS, explain_foreign_names, refuse_disguised

# Fields of config.json that count blocks behind the last one, which predict further tokens.
_FURTHER_LAYERS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")
# Parts of a base model that a class may leave out while the checkpoint has them; transformers ignores them too.
_LEFT_OUT = re.compile(r"pooler|mtp\w*|\w*(vision|visual|audio|image|multi_modal|multimodal)\w*")
_EXPERT = re.compile(r"(.*\.experts\.)(\d+)(\..*)")
_SHOWN = 4  # names of each kind of difference in an error


@runtime_checkable
class Weights(Protocol):
    """What a skeleton needs of its source: a Checkpoint (storage/source.py), or for ``plan`` a DescribedCheckpoint
    (shapes.py)."""

    @property
    def directory(self) -> Path: ...
    @property
    def config(self) -> dict[str, Any]: ...
    @property
    def tensors(self) -> Mapping[str, Any]: ...
    @property
    def notices(self) -> Sequence[str]: ...
    def read(self, name: str) -> Tensor: ...
    def tensors_equal(self, one: str, other: str) -> bool: ...


@dataclass(frozen=True)
class Naming:
    """Which names of a checkpoint are which of a model.

    Attributes:
        sources: name in the model -> name in the checkpoint, of every tensor of the model that is stored as it is;
            tied ones once.
        converted: name in the model -> the stored tensors that it is made of, where it is not one of them as it is.
        conversion: reads the converted ones, and knows which of their rows are which (conversion.py).
        extra: names of stored tensors that are no part of the model; they are copied.
        notices: sentences for the user.
        untied: the config ties tensors that the checkpoint stores with different values, so they are not tied.
        absent: the modules (``pooler``) of which the checkpoint has no tensor, and without which the model is built.
    """

    sources: dict[str, str]
    extra: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()
    untied: bool = False
    absent: tuple[str, ...] = ()
    converted: dict[str, Source] = field(default_factory=dict)
    conversion: Conversion | None = field(default=None, repr=False, compare=False)


def match_names(model: PreTrainedModel, checkpoint: Weights) -> Naming:
    """Find every tensor of ``model``, which is on the meta device, in ``checkpoint``.

    Raises:
        CheckpointError: tensors are missing, have another shape or dtype, or do not belong to the model. The first of
            each are named, and what kind of checkpoint it is where the names tell.
    """
    conversion = Conversion(model, checkpoint.tensors)
    expected = dict(model.state_dict(keep_vars=True))
    found, missing, untied = _resolve_ties(model, expected, conversion, checkpoint)
    _refuse_experts_twice(conversion, checkpoint)
    experts = _missing_experts(expected, conversion)
    missing += [part for parts in experts.values() for part in parts]
    wrong = list(_wrong_shapes(expected, conversion, experts))
    left = {
        name: renamed
        for name, renamed in conversion.unread.items()
        if not _is_buffer(model, renamed) and not _is_table(model, name)
    }
    extra = [
        name for name in checkpoint.tensors if name in left and _is_extra(name, left[name], model, checkpoint.config)
    ]
    unexpected = sorted(left.keys() - set(extra))
    pooler = {name for name in expected if ".pooler." in f".{name}"}
    absent = ("pooler",) if missing and set(missing) == pooler else ()
    if (missing and not absent) or wrong or unexpected:
        refuse_disguised(checkpoint.tensors, checkpoint.directory)
        unknown = {name: _beyond(model, left[name]) for name in ([*unexpected, *extra] if missing else unexpected)}
        raise _disagreement(missing, wrong, unknown, checkpoint, _head(model))
    _check_dtypes(expected, found, checkpoint)
    notices = []
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        notices.append(f"'{extra[0]}'{more}: no part of {type(model).__name__}, copied, not quantized")
    if untied:
        notices.append(
            "config.json ties the output head to the embeddings, "
            "the checkpoint stores another head: they are kept apart"
        )
    if absent:
        notices.append(f"the checkpoint has no {absent[0]}: the model is read without it")
    sources = {name: source.stored[0] for name, source in found.items() if not source.converted}
    converted = {name: source for name, source in found.items() if source.converted}
    return Naming(sources, tuple(extra), tuple(notices), untied, absent, converted, conversion)


def _resolve_ties(
    model: PreTrainedModel, expected: Mapping[str, Any], conversion: Conversion, checkpoint: Weights
) -> tuple[dict[str, Source], list[str], bool]:
    """Sources, missing names, and whether tensors are untied, as transformers decides (PreTrainedModel.tie_weights): a
    tied tensor that is stored with other values than its owner is untied; where only the tied one is stored it is read
    for both."""
    found = conversion.sources
    tied: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
    sources = {name: source for name, source in found.items() if name not in tied}
    stored_twice = [name for name, owner in tied.items() if name in found and owner in found]
    untied = any(
        not _equal(conversion, name, tied[name], checkpoint)
        for name in stored_twice
        if _same_shape(expected, name, tied[name])
    )
    missing = [name for name in expected if name not in found and name not in tied and name not in conversion.failed]
    for target, owner in tied.items():
        if owner not in found and target in found:
            sources[owner] = found[target]
            missing = [name for name in missing if name != owner]
        if untied and sources.get(owner) is not None:  # not tied: each has a tensor of its own in the result
            sources[target] = found.get(target, sources[owner])
    return sources, missing, untied


def _equal(conversion: Conversion, one: str, other: str, checkpoint: Weights) -> bool:
    """Whether two tensors of the model are stored with the same values."""
    first, second = conversion.sources[one], conversion.sources[other]
    if first == second:
        return True
    if not (first.converted or second.converted):
        return checkpoint.tensors_equal(first.stored[0], second.stored[0])
    return torch.equal(conversion.read(one, checkpoint.read), conversion.read(other, checkpoint.read))


def _same_shape(expected: Mapping[str, Any], one: str, other: str) -> bool:
    return one in expected and other in expected and expected[one].shape == expected[other].shape


def _refuse_experts_twice(conversion: Conversion, checkpoint: Weights) -> None:
    """CheckpointError where an expert is stored alone and in a tensor of all."""
    for name, parts in conversion.parts.items():
        whole = conversion.sources.get(name)
        if whole is not None and not whole.converted and _EXPERT.fullmatch(parts[0]):
            what = f"'{parts[0]}' is stored twice, alone and in '{whole.stored[0]}'"
            raise CheckpointError(what, checkpoint.directory, "Get another copy of the checkpoint")


def _missing_experts(expected: Mapping[str, Any], conversion: Conversion) -> dict[str, list[str]]:
    """Names in the model of tensors that are merged of every expert's -> those that are not stored."""
    found: dict[str, list[str]] = {}
    for name, parts in conversion.parts.items():
        if name not in conversion.failed and conversion.shapes.get(name) == tuple(expected[name].shape):
            continue
        there: dict[tuple[str, str], set[int]] = {}
        for part in parts:
            if (match := _EXPERT.fullmatch(part)) is not None:
                there.setdefault((match[1], match[3]), set()).add(int(match[2]))
        every = range(len(expected[name]))
        lost = [f"{head}{n}{tail}" for (head, tail), held in there.items() for n in every if n not in held]
        if lost:
            found[name] = lost
    return found


def _wrong_shapes(expected: Mapping[str, Any], conversion: Conversion, known: Container[str]) -> Iterator[str]:
    """A phrase for each tensor, but those ``known`` to lack parts, that is not of the model's shape."""
    yield from (what for name, what in conversion.failed.items() if name not in known)
    for name, stored in conversion.shapes.items():
        if name not in known and stored != (wanted := tuple(expected[name].shape)):
            yield f"{name} has shape {list(stored)}, the config asks for {list(wanted)}"


def _check_dtypes(expected: Mapping[str, Any], sources: Mapping[str, Source], checkpoint: Weights) -> None:
    """Raise CheckpointError, before a weight is read, for weights that are not floats of 16 bits or more."""
    wrong = [
        (name, checkpoint.tensors[stored].dtype)
        for name, source in sources.items()
        for stored in source.stored
        if expected[name].is_floating_point() and checkpoint.tensors[stored].dtype not in FLOATS
    ]
    if wrong:
        name, dtype = wrong[0]
        kind = f"fp8 ({dtype})" if dtype.startswith("F8") else f"integers ({dtype})"
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise CheckpointError(
            f"'{name}'{more} is stored as {kind}, not as floats of 16 bits or more: these are quantized weights",
            checkpoint.directory,
            "Give the original float32, float16 or bfloat16 checkpoint",
        )


def _is_extra(name: str, renamed: str, model: PreTrainedModel, config: Mapping[str, Any]) -> bool:
    """Whether a tensor that the model does not have belongs to something beside the model that transformers does not
    read either; False: it lies inside of the model's own modules. ``renamed``: what it would be called in the model."""
    if explain_foreign_names([_beyond(model, renamed)]) is not None:
        return False
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    if any(re.search(pattern, one) for pattern in ignored for one in (name, renamed)):
        return True
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    *path, _ = renamed.removeprefix(prefix).split(".")  # as the base model would call its module
    module: Any = model.base_model
    for depth, part in enumerate(path):
        if part in module._modules:
            module = module._modules[part]
        elif isinstance(module, nn.ModuleList) and part.isdigit():
            # Blocks behind the last one, which predict further tokens.
            return len(module) <= int(part) < len(module) + _further_layers(config)
        elif depth == 0 and not name.startswith(prefix):
            # One more tensor of a module that the model has, such as a bias of its head, would change what it computes.
            return renamed.rpartition(".")[0] not in {one for one, _ in model.named_modules()}
        else:
            return isinstance(module, PreTrainedModel) and _LEFT_OUT.fullmatch(part) is not None
    return False


def _further_layers(config: Mapping[str, Any]) -> int:
    """How many blocks behind the last one config.json, or a section of it, announces."""
    sections = [config, *(section for section in config.values() if isinstance(section, dict))]
    counts = (section.get(key) for section in sections for key in _FURTHER_LAYERS)
    return max((count for count in counts if type(count) is int), default=0)


def _beyond(model: PreTrainedModel, renamed: str) -> str:
    """The part of a name that is not the path of a module of the model."""
    module: Any = model
    rest = renamed
    while (part := rest.partition("."))[0] in module._modules and part[2]:
        module, rest = module._modules[part[0]], part[2]
    return rest


def _disagreement(
    missing: list[str], wrong: list[str], beyond: Mapping[str, str], checkpoint: Weights, head: str | None
) -> CheckpointError:
    """The error that names what does not fit, a few of each kind, and says what the names tell of the checkpoint.
    ``beyond``: the unknown names, and what of each is not the path of a module."""
    unknown = list(beyond)
    foreign = [name if explain_foreign_names([rest]) else rest for name, rest in beyond.items()]
    way_out = _prefixed(missing, unknown) or explain_foreign_names(foreign)
    parts = [*_few(missing, " is missing"), *_few(wrong, ""), *_few(unknown, " is not part of the model")]
    if way_out is None and not (wrong or unknown) and all(name.rpartition(".")[0] == head for name in missing):
        way_out = (
            "If the model has no head of its own, set tie_word_embeddings to true, "
            "or name the class without a head under architectures"
        )
    return CheckpointError(f"config and tensors disagree: {'; '.join(parts)}", checkpoint.directory,
                           way_out or "Use the config that belongs to these weights")  # fmt: skip


def _head(model: PreTrainedModel) -> str | None:
    """The path of the language-model head, where the class has one."""
    head = model.get_output_embeddings()
    return next((path for path, module in model.named_modules() if head is not None and module is head), None)


def _few(names: Sequence[str], what: str) -> list[str]:
    more = [f"and {len(names) - _SHOWN} more{what.replace(' is ', ' ')}"] if len(names) > _SHOWN else []
    return [f"{name}{what}" for name in names[:_SHOWN]] + more


def _prefixed(missing: Sequence[str], unknown: Sequence[str]) -> str | None:
    """The way out where a missing tensor is stored with a prefix before its name; None where it is not."""
    for name in missing[:1]:
        longer = next((other for other in unknown if other.endswith(f".{name}")), None)
        if longer is not None:
            return (
                f"The names begin with '{longer.removesuffix(name)}': they are of a model inside of another. "
                "Give the whole model's checkpoint with its own config.json, or save it without that prefix"
            )
    return None


def _is_buffer(model: PreTrainedModel, renamed: str) -> bool:
    """Whether a stored tensor is a buffer of the model that it does not store today, with or without the base model's
    prefix."""
    prefix = f"{model.base_model_prefix}."
    names = {name for name, _ in model.named_buffers()}
    return not names.isdisjoint((renamed, prefix + renamed, renamed.removeprefix(prefix)))


def _is_table(model: PreTrainedModel, name: str) -> bool:
    """Whether a stored tensor is a buffer that today's modules compute."""
    return name.endswith(OLD_BUFFERS) and name not in dict(model.named_parameters())

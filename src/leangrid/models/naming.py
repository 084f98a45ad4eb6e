"""Which tensor of a checkpoint is which of the model: found by name, compared in shape and dtype, tied as transformers
ties them.

What a checkpoint holds beside the model (a layer that predicts further tokens, the head of another task) is copied to
the result under its own name. A tensor inside of the model's own modules that the model does not have is refused."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor
from transformers import PreTrainedModel

from leangrid.errors import CheckpointError
from leangrid.storage.dtypes import FLOATS
from leangrid.storage.foreign import OLD_BUFFERS, explain_foreign_names, refuse_disguised

# Names that old checkpoints use for today's parameters.
_LEGACY_SUFFIXES = (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))
# Fields of config.json that count blocks behind the last one, which predict further tokens.
_FURTHER_LAYERS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")
# Parts of a base model that a class may leave out while the checkpoint has them; transformers ignores them too.
_LEFT_OUT = re.compile(r"pooler|mtp\w*|\w*(vision|visual|audio|image|multi_modal|multimodal)\w*")
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
        sources: name in the model -> name in the checkpoint, of every tensor of the model that is stored; tied ones
            once.
        extra: names of stored tensors that are no part of the model; they are copied as stored.
        notices: sentences for the user.
        untied: the config ties tensors that the checkpoint stores with different values, so they are not tied.
        absent: the modules (``pooler``) of which the checkpoint has no tensor, and without which the model is built.
    """

    sources: dict[str, str]
    extra: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()
    untied: bool = False
    absent: tuple[str, ...] = ()


def match_names(model: PreTrainedModel, checkpoint: Weights, blocks: str, count: int) -> Naming:
    """Find every tensor of ``model`` in ``checkpoint``.

    Args:
        model: on the meta device.
        blocks: the path of its list of blocks with a final dot, such as ``model.layers.``.
        count: the number of blocks.

    Raises:
        CheckpointError: tensors are missing, have another shape or dtype, or do not belong to the model. The first of
            each are named, and what kind of checkpoint it is where the names tell.
    """
    prefix = model.base_model_prefix
    expected = dict(model.state_dict(keep_vars=True))
    found = {name: spelled for name in expected if (spelled := _stored_as(name, prefix, checkpoint)) is not None}
    sources, missing, untied = _resolve_ties(model, expected, found, checkpoint)
    wrong = list(_wrong_shapes(expected, found, checkpoint))
    known = {spelled for name in expected for spelled in _spellings(name, prefix)}
    known |= {spelled for name, _ in model.named_buffers() for spelled in _spellings(name, prefix)}
    left = [name for name in checkpoint.tensors if name not in known and not _is_table(model, name)]
    extra = [name for name in left if _is_extra(name, model, checkpoint.config, blocks, count)]
    unexpected = sorted(set(left) - set(extra))
    pooler = {name for name in expected if ".pooler." in f".{name}"}
    absent = ("pooler",) if missing and set(missing) == pooler else ()
    if (missing and not absent) or wrong or unexpected:
        refuse_disguised(checkpoint.tensors, checkpoint.directory)
        raise _disagreement(missing, wrong, unexpected, extra, checkpoint, _head(model))
    _check_dtypes(expected, sources, checkpoint)
    notices = []
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        notices.append(f"'{extra[0]}'{more}: no part of {type(model).__name__}, copied as stored, not quantized")
    if untied:
        notices.append(
            "config.json ties the output head to the embeddings, "
            "the checkpoint stores another head: they are kept apart"
        )
    if absent:
        notices.append(f"the checkpoint has no {absent[0]}: the model is read without it")
    return Naming(sources, tuple(extra), tuple(notices), untied, absent)


def _resolve_ties(
    model: PreTrainedModel, expected: Mapping[str, Any], found: Mapping[str, str], checkpoint: Weights
) -> tuple[dict[str, str], list[str], bool]:
    """Sources, missing names, and whether tensors are untied, as transformers decides (PreTrainedModel.tie_weights): a
    tied tensor that is stored with other values than its owner is untied; where only the tied one is stored it is read
    for both."""
    tied: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
    sources = {name: spelled for name, spelled in found.items() if name not in tied}
    stored_twice = [name for name, owner in tied.items() if name in found and owner in found]
    untied = any(
        not checkpoint.tensors_equal(found[name], found[tied[name]])
        for name in stored_twice
        if _same_shape(expected, name, tied[name])
    )
    missing = [name for name in expected if name not in found and name not in tied]
    for target, owner in tied.items():
        if owner not in found and target in found:
            sources[owner] = found[target]
            missing = [name for name in missing if name != owner]
        if untied and sources.get(owner) is not None:  # not tied: each has a tensor of its own in the result
            sources[target] = found.get(target, sources[owner])
    return sources, missing, untied


def _same_shape(expected: Mapping[str, Any], one: str, other: str) -> bool:
    return one in expected and other in expected and expected[one].shape == expected[other].shape


def _wrong_shapes(expected: Mapping[str, Any], found: Mapping[str, str], checkpoint: Weights) -> Iterator[str]:
    for name, spelled in found.items():
        stored, wanted = tuple(checkpoint.tensors[spelled].shape), tuple(expected[name].shape)
        if stored != wanted:
            yield f"{name} has shape {list(stored)}, the config asks for {list(wanted)}"


def _check_dtypes(expected: Mapping[str, Any], sources: Mapping[str, str], checkpoint: Weights) -> None:
    """Raise CheckpointError, before a weight is read, for weights that are not floats of 16 bits or more."""
    wrong = [
        (name, checkpoint.tensors[spelled].dtype)
        for name, spelled in sources.items()
        if expected[name].is_floating_point() and checkpoint.tensors[spelled].dtype not in FLOATS
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


def _is_extra(name: str, model: PreTrainedModel, config: Mapping[str, Any], blocks: str, count: int) -> bool:
    """Whether a tensor that the model does not have belongs to something beside the model that transformers does not
    read either; False: it lies inside of the model's own modules."""
    if explain_foreign_names([name]) is not None:
        return False
    if any(re.search(pattern, name) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()):
        return True
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    inner = name.removeprefix(prefix)  # as the base model would call it
    number = re.match(rf"{re.escape(blocks.removeprefix(prefix))}(\d+)\.", inner)
    if number:
        further = max((value for key in _FURTHER_LAYERS if type(value := config.get(key)) is int), default=0)
        return count <= int(number[1]) < count + further
    body: Any = model.base_model
    top = inner.partition(".")[0]
    if top in {child for child, _ in (*body.named_children(), *body.named_parameters(recurse=False))}:
        return False
    if inner != name:
        return _LEFT_OUT.fullmatch(top) is not None
    # One more tensor of a module that the model has, such as a bias of its head, would change what it computes.
    return name.rpartition(".")[0] not in {path for path, _ in model.named_modules()}


def _disagreement(
    missing: list[str],
    wrong: list[str],
    unexpected: list[str],
    extra: list[str],
    checkpoint: Weights,
    head: str | None,
) -> CheckpointError:
    """The error that names what does not fit, a few of each kind, and says what the names tell of the checkpoint."""
    unknown = [*unexpected, *extra] if missing else unexpected
    way_out = _prefixed(missing, unknown) or explain_foreign_names(unknown)
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


def _stored_as(name: str, prefix: str, checkpoint: Weights) -> str | None:
    return next((spelled for spelled in _spellings(name, prefix) if spelled in checkpoint.tensors), None)


def _spellings(name: str, prefix: str) -> Iterator[str]:
    """The names under which a checkpoint may store the tensor that the model calls ``name``: with or without the base
    model's prefix, today's or those of old checkpoints."""
    for candidate in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
        yield candidate
        for new, old in _LEGACY_SUFFIXES:
            if candidate.endswith(new):
                yield candidate.removesuffix(new) + old


def _is_table(model: PreTrainedModel, name: str) -> bool:
    """Whether a stored tensor is a buffer that today's modules compute."""
    return name.endswith(OLD_BUFFERS) and name not in dict(model.named_parameters())

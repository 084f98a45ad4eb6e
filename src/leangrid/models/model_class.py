"""The model that a config.json describes, as transformers builds it, without weights.

No code of the checkpoint runs: the class is one of transformers' own."""

import inspect
import mmap
from collections.abc import Collection, Mapping
from copy import deepcopy
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _LazyAutoMapping

from leangrid.errors import ArchitectureError, CheckpointError, first_line
from leangrid.models.experts import unfuse_experts
from leangrid.models.naming import Weights

_FILLS = {"normal_", "uniform_", "fill_", "zero_", *(name for name in vars(nn.init) if name.endswith("_"))}
_LARGE, _HUGE = 1 << 20, 1 << 30  # bytes


def described_model(config: dict[str, Any]) -> PreTrainedModel:
    """The dense model that the config.json of a finished result describes, on the meta device. Raises as ``Skeleton``
    does."""
    known_type(config)
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    return build_empty(config_of(plain))


def empty_model(checkpoint: Weights) -> PreTrainedModel:
    """The model that a checkpoint's config describes, as transformers builds it, parameters and buffers on the meta
    device. Raises as ``Skeleton`` does."""
    with torch.device("meta"):
        return build_empty(read_model_config(checkpoint))


def known_type(config: Mapping[str, Any]) -> str:
    """The model type of a config.json; ArchitectureError where transformers has none of that name.

    A checkpoint with code of its own (``auto_map``) is read as transformers' model of its type; its code is never run.
    """
    name = config.get("model_type")
    if not isinstance(name, str) or name not in transformers.CONFIG_MAPPING:
        raise ArchitectureError(
            f"the architecture '{name}' is not known to transformers {transformers.__version__}",
            "config.json: model_type",
            "Upgrade transformers, or give a checkpoint of a type that it has",
        )
    return name


def config_of(fields: Mapping[str, Any]) -> PreTrainedConfig:
    """transformers' config of a config.json's fields; infinities as transformers spells them in JSON are read."""
    kind = transformers.CONFIG_MAPPING[fields["model_type"]]
    return kind.from_dict(_plain(deepcopy(dict(fields))))  # transformers completes nested dicts in place


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        if set(value) == {"__float__"} and isinstance(value["__float__"], str):
            return float(value["__float__"].replace("Infinity", "inf"))
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def read_model_config(checkpoint: Weights) -> PreTrainedConfig:
    """transformers' config of a checkpoint. Raises as ``Skeleton`` does."""
    stated = checkpoint.config.get("dtype", checkpoint.config.get("torch_dtype"))
    if isinstance(stated, str) and not isinstance(getattr(torch, stated, None), torch.dtype):
        where = checkpoint.directory / "config.json"
        raise CheckpointError(
            f"config.json calls {stated[:40]!r} the weights' dtype, which torch does not know",
            where,
            "Write bfloat16, float16 or float32",
        )
    known_type(checkpoint.config)
    try:
        config = config_of(checkpoint.config)
    except MemoryError:
        raise
    except Exception as error:  # any value of the config may raise anything inside of transformers' classes
        where = checkpoint.directory / "config.json"
        raise _unknown_rope(checkpoint.config, where) or CheckpointError(
            f"the config cannot be used: {first_line(error)}", where
        ) from error
    config.use_cache = False
    return config


def _unknown_rope(config: Mapping[str, Any], where: object) -> CheckpointError | None:
    """The error for a rotary embedding whose type transformers does not compute; None where the config names none."""
    known = {"default", *ROPE_INIT_FUNCTIONS}
    for key in ("rope_scaling", "rope_parameters"):
        rope = config.get(key)
        for part in (rope, *rope.values()) if isinstance(rope, dict) else ():
            kind = part.get("rope_type", part.get("type")) if isinstance(part, dict) else None
            if kind is not None and kind not in known:
                way_out = (
                    "'su' is longrope's first name: write longrope"
                    if kind == "su"
                    else f"Known: {', '.join(sorted(known))}"
                )
                return CheckpointError(
                    f"rope_scaling is of type {str(kind)[:40]!r}, which transformers does not compute", where, way_out
                )
    return None


def build_empty(config: PreTrainedConfig, without: tuple[str, ...] = ()) -> PreTrainedModel:
    """The model of ``config``, as transformers builds it, in evaluation mode. Parameters are on the meta device;
    buffers (rotary tables, position ids) are computed.

    Args:
        without: parts that are left out (``pooler``).
    """
    model_class = _model_class(config)
    options: dict[str, Any] = {"add_pooling_layer": False} if "pooler" in without else {}
    try:
        with init_empty_weights(include_buffers=False), NothingAllocated():
            model = model_class(config, **options)
    except MemoryError:
        raise
    except Exception as error:
        built = CheckpointError(f"no model can be built from the config: {first_line(error)}", "config.json")
        raise _unknown_rope(config.to_dict(), "config.json") or built from error
    model.tie_weights()
    return model.eval()


def has_lm_head(model: PreTrainedModel) -> bool:
    """Whether a model predicts the next token: it can generate, and is no encoder."""
    config = model.config
    reads = getattr(config, "is_decoder", None) is not False or bool(getattr(config, "is_encoder_decoder", False))
    return reads and bool(model.can_generate()) and model.get_output_embeddings() is not None


def with_experts_apart(model: PreTrainedModel, keep: Collection[str] = (), linears: bool = True) -> PreTrainedModel:
    """The same model, changed: one linear for each matrix of each expert (experts.py), but of the mixtures at the paths
    ``keep``. Without ``linears`` they are made later, a block at a time."""
    if unfuse_experts(model, keep, linears):
        try:
            model.tie_weights()
        except ValueError as error:  # transformers ties experts of two modules by the names of their fused tensors
            what = f"its experts are tied to each other: {first_line(error)}"
            raise ArchitectureError(
                what, type(model).__name__, "leangrid cannot quantize this kind of model"
            ) from error
    return model


def _model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that ``architectures`` names; without it the one with a language-model head, where there is one."""
    names = getattr(config, "architectures", None) or []
    family = transformers.CONFIG_MAPPING[config.model_type].__name__.removesuffix("Config").removesuffix("Text")
    if isinstance(names, list) and names:
        name = names[0]
    else:
        causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
        decodes = causal is not None and getattr(config, "is_decoder", None) is not False
        name = causal if decodes else f"{family}Model"
    found = class_named(name, type(config)) if isinstance(name, str) else None
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel) and _takes(found, config)):
        raise ArchitectureError(
            f"'{name}' is no {config.model_type} model of transformers {transformers.__version__}",
            "config.json: architectures",
            f"Expected a class such as {family}ForCausalLM or {family}Model",
        )
    return found


def class_named(name: str, config_class: type) -> Any:
    """The class ``name`` of transformers, or that the process has registered for ``config_class`` with one of its
    automatic classes; None where there is none."""
    mappings = (mapping for mapping in vars(modeling_auto).values() if isinstance(mapping, _LazyAutoMapping))
    own = (mapping._extra_content.get(config_class) for mapping in mappings)
    registered = (found for found in own if isinstance(found, type) and found.__name__ == name)
    return getattr(transformers, name, None) or next(registered, None)


def _takes(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> bool:
    expected = getattr(model_class, "config_class", None)
    if isinstance(expected, type) and isinstance(config, expected):
        return True
    for mapping in (value for name, value in vars(modeling_auto).items() if name.endswith("_MAPPING_NAMES")):
        classes = mapping.get(config.model_type, ())
        if model_class.__name__ in ((classes,) if isinstance(classes, str) else classes):
            return True  # the class of another type, which transformers takes for this one too
    said = inspect.signature(model_class.__init__).parameters.get("config")
    return said is not None and said.annotation in (type(config), type(config).__name__)


class NothingAllocated(TorchFunctionMode):
    """Makes ``torch.empty``, which allocates parameters, return meta tensors, takes large zeros from memory of their
    own, and fills no meta tensor with numbers, which torch takes milliseconds to do nothing for.

    Parameters that are allocated first and then put on the meta device leave holes in the heap: 9 GB of addresses for
    249 small blocks, which count against a limit on memory, and 430 MB of resident zeros for 58 routers of experts."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if func is torch.empty and given.get("device") is None:
            given["device"] = "meta"
        elif func is torch.zeros and not given.keys() & {"device", "out"} and torch.get_default_device().type == "cpu":
            return _zeros(func(*args, **given, device="meta"))
        elif getattr(func, "__name__", "") in _FILLS:
            filled = args[0] if args else given.get("tensor")
            if isinstance(filled, torch.Tensor) and filled.is_meta:
                return filled
        return func(*args, **given)


def _zeros(like: torch.Tensor) -> torch.Tensor:
    """Zeros like a meta tensor. Large ones are pages that nothing was written to, which are no memory, and are given
    back when the tensor is let go; what is larger than any buffer stays on the meta device."""
    if like.nbytes < _LARGE:
        return torch.zeros_like(like, device="cpu", requires_grad=like.requires_grad)
    if like.nbytes >= _HUGE:
        return like
    pages = torch.frombuffer(mmap.mmap(-1, like.nbytes), dtype=like.dtype).reshape(like.shape)
    return pages.requires_grad_(like.requires_grad)

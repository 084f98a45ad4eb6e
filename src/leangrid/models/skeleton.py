"""A model without its weights: modules on the meta device, tensors read from the checkpoint while they are needed.

A block is materialised, quantized, written and released before the next one, so memory grows with the largest block,
not with the model."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from threading import Lock
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from leangrid.errors import ArchitectureError, CheckpointError, first_line
from leangrid.models.architectures import Architecture, Groups, architecture_of
from leangrid.models.experts import unfuse_experts
from leangrid.models.naming import Naming, Weights, match_names
from leangrid.storage.dtypes import plain_dtype
from leangrid.storage.safetensors import TensorInfo


class Skeleton:
    """The model's modules on the meta device, whose weights can be read and released block by block.

    Args:
        checkpoint: an opened source, whose headers were checked; or the description of one.
        compute_dtype: the dtype of materialised parameters.

    Attributes:
        architecture: the row of the table (architectures.py).
        config: transformers' config.
        naming: which stored tensor is which of the model (naming.py).
        model: the whole model. base: the model without its head, at the path ``prefix`` in it.
        blocks: the list of blocks.
        dtype: the dtype in which most of the weights to be quantized are stored; float32 for float64.

    Raises:
        ArchitectureError: the model type is unknown or brings its own code.
        CheckpointError: config and tensors disagree; the first differences of each kind are named.
    """

    def __init__(self, checkpoint: Weights, compute_dtype: torch.dtype = torch.float32) -> None:
        self.checkpoint = checkpoint
        self.compute_dtype = compute_dtype
        self._reading = Lock()
        self.architecture: Architecture = architecture_of(checkpoint.config)
        self.config = _read_config(checkpoint)
        # First all on the meta device: buffers grow with what the config claims, which is not checked yet.
        with torch.device("meta"):
            empty = _empty_model(self.config, self.architecture)
        self.naming = _named(empty, self.architecture, checkpoint)
        del empty
        if self.naming.untied:
            _untie(self.config)
        self.model = _empty_model(self.config, self.architecture, without=self.naming.absent)
        self.prefix = _base_prefix(self.model)
        base = self.model.get_submodule(self.prefix) if self.prefix else self.model
        self.base: nn.Module = base
        self.blocks: nn.ModuleList = base.get_submodule(self.architecture.blocks)  # pyright: ignore[reportAttributeAccessIssue]
        self._sources = self.naming.sources
        self.dtype = self._stored_dtype()

    def block_name(self, index: int) -> str:
        """The path of block ``index`` in the model, such as ``model.layers.3``."""
        return f"{self._base_dot}{self.architecture.blocks}.{index}"

    @property
    def _base_dot(self) -> str:
        return f"{self.prefix}." if self.prefix else ""

    @property
    def blocks_prefix(self) -> str:
        """The path of the list of blocks with a final dot, such as ``model.layers.``."""
        return f"{self._base_dot}{self.architecture.blocks}."

    @property
    def has_lm_head(self) -> bool:
        """Whether the model predicts the next token, so that it has a perplexity: a decoder with its head."""
        return self.architecture.kind == "decoder" and self.model.can_generate()

    @property
    def vocabulary(self) -> int:
        """Token ids that the model knows: rows of its embedding."""
        return self._embedding.shape[0]

    @property
    def hidden_size(self) -> int:
        """Numbers in a token's hidden state between two blocks."""
        return self._embedding.shape[1]

    @property
    def _embedding(self) -> Tensor:
        table: Any = self.base.get_input_embeddings()  # pyright: ignore[reportCallIssue]
        return table.weight

    def groups(self, index: int) -> Groups:
        """The linears of block ``index`` grouped by shared input, as paths from the block, in the order of the forward
        pass."""
        return self.architecture.groups_of(self.blocks[index])

    def group_shapes(self) -> list[list[tuple[int, int]]]:
        """(rows, cols) of the linears into attention, out of it, into the MLP and out of it, four lists, for the block
        with the most weights.

        Linears of further groups (compressed queries, experts, shared experts) are in the list of the part they belong
        to."""
        if not self.architecture.sparse:
            return [
                [self.shape(f"{self.block_name(0)}.{name}") for name in names] for names in self.architecture.groups
            ]
        largest = max(
            range(len(self.blocks)), key=lambda index: sum(p.numel() for p in self.blocks[index].parameters())
        )
        parts: list[list[tuple[int, int]]] = [[], [], [], []]
        for name in (name for names in self.groups(largest) for name in names):
            leaf = name.rpartition(".")[2]
            place = (
                (1 if leaf == "o_proj" else 0)
                if name.startswith("self_attn.")
                else 3
                if leaf in ("down_proj", "w2")
                else 2
            )
            parts[place].append(self.shape(f"{self.block_name(largest)}.{name}"))
        return parts

    def linear_names(self, index: int) -> list[str]:
        """The paths in the model of the linears of block ``index`` that are quantized, in the order of the groups."""
        return [f"{self.block_name(index)}.{name}" for group in self.groups(index) for name in group]

    def all_linear_names(self) -> list[str]:
        """The paths of all linears that are quantized, block after block."""
        return [name for index in range(len(self.blocks)) for name in self.linear_names(index)]

    def shape(self, linear: str) -> tuple[int, int]:
        """(rows, cols) = (out_features, in_features) of a linear."""
        rows, cols = self.architecture.transposed(self.model.get_parameter(f"{linear}.weight")).shape
        return rows, cols

    def read(self, name: str) -> Tensor:
        """The tensor that the model calls ``name``, as the checkpoint stores it. Any thread may call this."""
        with self._reading:  # a checkpoint has one open file with one position
            return self.checkpoint.read(self._sources[name])

    def tensor_info(self, name: str) -> TensorInfo:
        """The header entry of the tensor that the model calls ``name``: file, dtype, shape, bytes."""
        return self.checkpoint.tensors[self._sources[name]]

    def parameter_names(self) -> list[str]:
        """The names of all tensors of the model that the checkpoint holds, tied ones once."""
        return list(self._sources)

    def materialise(self, module: nn.Module, prefix: str, skip: str | None = None) -> None:
        """Fill ``module``, which lies at the path ``prefix`` in the model, from the checkpoint, except what lies below
        ``skip``, a path with a final dot."""
        dot = f"{prefix}." if prefix else ""
        for name, parameter in list(module.named_parameters()):
            full = dot + name
            if not parameter.is_meta or (skip and full.startswith(skip)) or full not in self._sources:
                continue
            _set_parameter(module, name, self.read(full).to(self.compute_dtype))
        for name, buffer in list(module.named_buffers()):
            full = dot + name
            if full in self._sources and not (skip and full.startswith(skip)):
                buffer.copy_(self.read(full).to(buffer.dtype))

    def block_sources(self, index: int) -> list[str]:
        """The names that the tensors of block ``index`` have in the checkpoint."""
        prefix = f"{self.block_name(index)}."
        return [source for name, source in self._sources.items() if name.startswith(prefix)]

    def read_block(self, index: int) -> dict[str, Tensor]:
        """The parameters of block ``index`` by their names in the block, in the compute dtype, in host memory."""
        prefix = f"{self.block_name(index)}."
        names = (name for name, _ in self.blocks[index].named_parameters() if prefix + name in self._sources)
        return {name: self.read(prefix + name).to(self.compute_dtype) for name in names}

    @contextmanager
    def load_block(
        self, index: int, device: torch.device | str = "cpu", weights: Mapping[str, Tensor] | None = None
    ) -> Iterator[nn.Module]:
        """Context: block ``index`` with its weights on ``device``, released at the end. ``weights`` are what
        ``read_block`` gave where that was called already; None reads them."""
        block = self.blocks[index]
        try:
            for name, weight in (weights or {}).items():
                _set_parameter(block, name, weight)
            self.materialise(block, self.block_name(index))
            block.to(device, non_blocking=True)
            yield block
        finally:
            self.release(block)

    @contextmanager
    def load_outside_blocks(self, device: torch.device | str = "cpu", lm_head: bool = False) -> Iterator[nn.Module]:
        """Context: the base model on ``device`` with the weights outside of its blocks (embeddings, norms), its blocks
        still empty; released at the end. ``lm_head``: the whole model, with its language-model
        head, instead."""
        model = self.model if lm_head else self.base
        self.materialise(model, "" if lm_head else self.prefix, skip=self.blocks_prefix)
        if lm_head:
            self.model.tie_weights()
        children = [child for child in model.modules() if not any(p.is_meta for p in child.parameters())]
        for child in children:
            child.to(device)
        try:
            yield model
        finally:
            for name, parameter in list(model.named_parameters()):
                if not parameter.is_meta:
                    _set_parameter(model, name, torch.empty_like(parameter, device="meta"))
            if lm_head:
                self.model.tie_weights()

    def release(self, module: nn.Module) -> None:
        """Free the memory of the module's parameters: they are on the meta device again."""
        for name, parameter in list(module.named_parameters()):
            _set_parameter(module, name, torch.empty_like(parameter, device="meta"))

    def _stored_dtype(self) -> torch.dtype:
        """The dtype of most of the weights to be quantized; float32 for float64, in which no engine computes."""
        counts: Counter[str] = Counter()
        for name in self.all_linear_names():
            info = self.checkpoint.tensors[self._sources[f"{name}.weight"]]
            counts[info.dtype] += int(torch.Size(info.shape).numel())
        return plain_dtype(counts.most_common(1)[0][0]) or torch.float32


def described_model(config: dict[str, Any]) -> PreTrainedModel:
    """The dense model that the config.json of a finished result describes, on the meta device. Raises as ``Skeleton``
    does."""
    kind = transformers.CONFIG_MAPPING[config["model_type"]]
    plain = kind.from_dict(deepcopy({key: value for key, value in config.items() if key != "quantization_config"}))
    return _empty_model(plain, architecture_of(config))


def _set_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path) if path else module
    owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)


def empty_model(checkpoint: Weights) -> PreTrainedModel:
    """The model that a checkpoint's config describes, parameters and buffers on the meta device. Raises as ``Skeleton``
    does."""
    architecture = architecture_of(checkpoint.config)
    with torch.device("meta"):
        return _empty_model(_read_config(checkpoint), architecture)


def _read_config(checkpoint: Weights) -> PreTrainedConfig:
    stated = checkpoint.config.get("dtype", checkpoint.config.get("torch_dtype"))
    if isinstance(stated, str) and not isinstance(getattr(torch, stated, None), torch.dtype):
        where = checkpoint.directory / "config.json"
        raise CheckpointError(
            f"config.json calls {stated[:40]!r} the weights' dtype, which torch does not know",
            where,
            "Write bfloat16, float16 or float32",
        )
    kind = transformers.CONFIG_MAPPING[checkpoint.config["model_type"]]
    try:
        config = kind.from_dict(deepcopy(checkpoint.config))  # transformers completes nested dicts in place
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


def _empty_model(
    config: PreTrainedConfig, architecture: Architecture, without: tuple[str, ...] = ()
) -> PreTrainedModel:
    names = getattr(config, "architectures", None) or []
    family = transformers.CONFIG_MAPPING[config.model_type].__name__.removesuffix("Config").removesuffix("Text")
    name = (
        names[0]
        if isinstance(names, list) and names
        else f"{family}{'ForCausalLM' if architecture.kind == 'decoder' else 'Model'}"
    )
    model_class = getattr(transformers, name, None) if isinstance(name, str) and name.startswith(family) else None
    if not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
        raise ArchitectureError(
            f"'{name}' is no {config.model_type} model of transformers {transformers.__version__}",
            "config.json: architectures",
            f"Expected a class such as {family}ForCausalLM or {family}Model",
        )
    try:
        # Parameters stay empty; buffers (rotary tables, position ids) are small and computed for real.
        with init_empty_weights(include_buffers=False), _NothingAllocated():
            model = model_class(config, **({"add_pooling_layer": False} if "pooler" in without else {}))
            if architecture.sparse:
                unfuse_experts(model, config.model_type == "mixtral")
    except MemoryError:
        raise
    except Exception as error:
        built = CheckpointError(f"no model can be built from the config: {first_line(error)}", "config.json")
        raise _unknown_rope(config.to_dict(), "config.json") or built from error
    model.tie_weights()
    return model.eval()


class _NothingAllocated(TorchFunctionMode):
    """Makes ``torch.empty``, which allocates parameters, return meta tensors. Parameters that are allocated first and
    then put on the meta device leave holes in the heap: 9 GB of addresses for 249 small blocks, which count against a
    limit on memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if func is torch.empty and given.get("device") is None:
            given["device"] = "meta"
        return func(*args, **given)


def _named(model: PreTrainedModel, architecture: Architecture, checkpoint: Weights) -> Naming:
    prefix = _base_prefix(model)
    path = f"{prefix}.{architecture.blocks}" if prefix else architecture.blocks
    return match_names(model, checkpoint, f"{path}.", len(list(model.get_submodule(path).children())))


def _untie(config: PreTrainedConfig) -> None:
    for section in (config, config.get_text_config()):
        section.tie_word_embeddings = False  # pyright: ignore[reportAttributeAccessIssue]


def _base_prefix(model: PreTrainedModel) -> str:
    prefix = model.base_model_prefix
    return prefix if prefix and hasattr(model, prefix) else ""

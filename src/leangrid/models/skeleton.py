"""A model without its weights: shapes from the config, tensors from disk only while they are needed.

The skeleton lives on the meta device. A block is materialised, quantized, written and released before the next one, so
memory grows with the largest block and never with the model.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, Protocol, runtime_checkable

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from leangrid.errors import ArchitectureError, CheckpointError
from leangrid.models.architectures import Architecture, Groups, architecture_of
from leangrid.models.experts import separate
from leangrid.storage.safetensors import TensorInfo

# Names that old checkpoints use for today's parameters.
_LEGACY_SUFFIXES = (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


@runtime_checkable
class Weights(Protocol):
    """What a skeleton needs of its source: a Checkpoint, or for ``plan`` the description of one."""

    @property
    def directory(self) -> Path: ...
    @property
    def config(self) -> dict[str, Any]: ...
    @property
    def tensors(self) -> Mapping[str, Any]: ...
    @property
    def notices(self) -> Sequence[str]: ...
    def read(self, name: str) -> Tensor: ...


class Skeleton:
    """The model's modules on the meta device, and the way to fill and empty them.

    Args:
        checkpoint: an opened source (its headers were checked).
        compute_dtype: dtype of materialised parameters.

    Raises:
        ArchitectureError: the model type is unknown or brings its own code.
        CheckpointError: config and tensors disagree; all differences are listed.
    """

    def __init__(self, checkpoint: Weights, compute_dtype: torch.dtype = torch.float32) -> None:
        self.checkpoint = checkpoint
        self.compute_dtype = compute_dtype
        self._reading = Lock()
        self.architecture: Architecture = architecture_of(checkpoint.config)
        self.config = _read_config(checkpoint)
        with torch.device("meta"):  # tables grow with what the config claims: its shapes are held against the tensors first
            _match_names(_empty_model(self.config, self.architecture), checkpoint)
        self.model = _empty_model(self.config, self.architecture)
        self.prefix = _base_prefix(self.model)
        base = self.model.get_submodule(self.prefix) if self.prefix else self.model
        self.base: nn.Module = base
        self.blocks: nn.ModuleList = base.get_submodule(self.architecture.blocks)  # pyright: ignore[reportAttributeAccessIssue]
        self._sources = _match_names(self.model, checkpoint)
        self.dtype = self._stored_dtype()

    def block_name(self, index: int) -> str:
        """Path of block ``index`` in the model, e.g. ``model.layers.3``."""
        return f"{self._base_dot}{self.architecture.blocks}.{index}"

    @property
    def _base_dot(self) -> str:
        return f"{self.prefix}." if self.prefix else ""

    @property
    def blocks_prefix(self) -> str:
        """Path of the list of blocks with a final dot, e.g. ``model.layers.``."""
        return f"{self._base_dot}{self.architecture.blocks}."

    def groups(self, index: int) -> Groups:
        """The linears of block ``index`` by shared input, from the block."""
        return self.architecture.groups_of(self.blocks[index])

    def four_groups(self) -> list[list[tuple[int, int]]]:
        """Shapes of the linears into attention, out of it, into the MLP and out of it, for the block with the most weights.

        Where a block has more groups (compressed queries, experts, shared experts) each is counted with the one it runs beside.
        """
        if not self.architecture.sparse:
            return [[self.shape(f"{self.block_name(0)}.{name}") for name in names] for names in self.architecture.groups]
        largest = max(range(len(self.blocks)), key=lambda index: sum(p.numel() for p in self.blocks[index].parameters()))
        parts: list[list[tuple[int, int]]] = [[], [], [], []]
        for name in (name for names in self.groups(largest) for name in names):
            leaf = name.rpartition(".")[2]
            place = (1 if leaf == "o_proj" else 0) if name.startswith("self_attn.") else 3 if leaf in ("down_proj", "w2") else 2
            parts[place].append(self.shape(f"{self.block_name(largest)}.{name}"))
        return parts

    def linear_names(self, index: int) -> list[str]:
        """Full paths of the linears of block ``index`` that are quantized, in the order of the groups."""
        return [f"{self.block_name(index)}.{name}" for group in self.groups(index) for name in group]

    def shape(self, linear: str) -> tuple[int, int]:
        """(rows, cols) = (out_features, in_features) of a linear."""
        shape = tuple(self.model.get_parameter(f"{linear}.weight").shape)
        return (shape[1], shape[0]) if self.architecture.layer == "conv1d" else (shape[0], shape[1])

    def stored(self, name: str) -> Tensor:
        """One tensor as the checkpoint stores it, under its name in the model. Any thread may ask."""
        with self._reading:  # a checkpoint holds one open file and its position
            return self.checkpoint.read(self._sources[name])

    def stored_info(self, name: str) -> TensorInfo:
        """Where the checkpoint stores that tensor."""
        return self.checkpoint.tensors[self._sources[name]]

    def parameter_names(self) -> list[str]:
        """Names of all tensors of the model that the checkpoint holds (tied ones once)."""
        return list(self._sources)

    def materialise(self, module: nn.Module, prefix: str, skip: str | None = None) -> None:
        """Fill ``module`` (at path ``prefix``) from the checkpoint, except below ``skip`` (a path with a final dot)."""
        dot = f"{prefix}." if prefix else ""
        for name, parameter in list(module.named_parameters()):
            full = dot + name
            if not parameter.is_meta or (skip and full.startswith(skip)) or full not in self._sources:
                continue
            _set_parameter(module, name, self.stored(full).to(self.compute_dtype))
        for name, buffer in list(module.named_buffers()):
            full = dot + name
            if full in self._sources and not (skip and full.startswith(skip)):
                buffer.copy_(self.stored(full).to(buffer.dtype))

    def block_sources(self, index: int) -> list[str]:
        """The checkpoint's names of all tensors of block ``index``."""
        prefix = f"{self.block_name(index)}."
        return [source for name, source in self._sources.items() if name.startswith(prefix)]

    def block_weights(self, index: int) -> dict[str, Tensor]:
        """The parameters of block ``index``, named from the block, in the compute dtype in host memory."""
        prefix = f"{self.block_name(index)}."
        names = (name for name, _ in self.blocks[index].named_parameters() if prefix + name in self._sources)
        return {name: self.stored(prefix + name).to(self.compute_dtype) for name in names}

    @contextmanager
    def block(self, index: int, device: torch.device | str = "cpu", weights: Mapping[str, Tensor] | None = None) -> Iterator[nn.Module]:
        """Block ``index`` with its weights, for the length of the ``with``; ``weights`` are its ``block_weights`` if they are there."""
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
    def without_blocks(self, device: torch.device | str = "cpu", head: bool = False) -> Iterator[nn.Module]:
        """The base model with embeddings and norms filled and its blocks still empty; with ``head`` the whole model likewise."""
        model = self.model if head else self.base
        self.materialise(model, "" if head else self.prefix, skip=self.blocks_prefix)
        if head:
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
            if head:
                self.model.tie_weights()

    def release(self, module: nn.Module) -> None:
        """Put the module's parameters back on the meta device and free their memory."""
        for name, parameter in list(module.named_parameters()):
            _set_parameter(module, name, torch.empty_like(parameter, device="meta"))

    def _stored_dtype(self) -> torch.dtype:
        name = self._sources[f"{self.linear_names(0)[0]}.weight"]
        info = self.checkpoint.tensors[name]
        if info.dtype not in _DTYPES:
            raise CheckpointError(
                f"weights stored as {info.dtype} cannot be quantized", name, "Give a float32, float16 or bfloat16 checkpoint"
            )
        return _DTYPES[info.dtype]


def linear_shapes(config: dict[str, Any]) -> dict[str, tuple[tuple[int, int], str]]:
    """Every linear of the model that a config.json describes, in the model's order: name -> ((rows, cols), "linear" or "conv1d").

    Raises what ``Skeleton`` raises for a config that no model can be built from.
    """
    kind = transformers.CONFIG_MAPPING[config["model_type"]]
    plain = kind.from_dict({key: value for key, value in config.items() if key != "quantization_config"})
    found: dict[str, tuple[tuple[int, int], str]] = {}
    for name, module in _empty_model(plain, architecture_of(config)).named_modules():
        if isinstance(module, nn.Linear):
            found[name] = ((module.out_features, module.in_features), "linear")
        elif isinstance(module, Conv1D):
            found[name] = ((module.weight.shape[1], module.weight.shape[0]), "conv1d")
    return found


def _set_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path) if path else module
    owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)


def empty_model(checkpoint: Weights) -> PreTrainedModel:
    """The model that a checkpoint's config describes, wholly on the meta device; errors as ``Skeleton``."""
    architecture = architecture_of(checkpoint.config)
    with torch.device("meta"):
        return _empty_model(_read_config(checkpoint), architecture)


def _read_config(checkpoint: Weights) -> PreTrainedConfig:
    kind = transformers.CONFIG_MAPPING[checkpoint.config["model_type"]]
    try:
        config = kind.from_dict(dict(checkpoint.config))
    except MemoryError:
        raise
    except Exception as error:  # what a stranger's values do inside of transformers' classes, nobody can list
        raise CheckpointError(f"the config cannot be used: {error}", checkpoint.directory / "config.json") from error
    config.use_cache = False
    return config


def _empty_model(config: PreTrainedConfig, architecture: Architecture) -> PreTrainedModel:
    names = getattr(config, "architectures", None) or []
    family = transformers.CONFIG_MAPPING[config.model_type].__name__.removesuffix("Config").removesuffix("Text")
    name = names[0] if isinstance(names, list) and names else f"{family}{'ForCausalLM' if architecture.kind == 'decoder' else 'Model'}"
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
            model = model_class(config)
            if architecture.sparse:
                separate(model, config.model_type == "mixtral")
    except MemoryError:
        raise
    except Exception as error:
        raise CheckpointError(f"no model can be built from the config: {error}", "config.json") from error
    model.tie_weights()
    return model.eval()


class _NothingAllocated(TorchFunctionMode):
    """``torch.empty``, of which parameters are made, gives meta tensors at once. Parameters that are allocated and then put on the
    meta device leave holes in the heap: 9 GB of addresses for 249 small blocks, which a limit on memory counts."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if func is torch.empty and given.get("device") is None:
            given["device"] = "meta"
        return func(*args, **given)


def _base_prefix(model: PreTrainedModel) -> str:
    prefix = model.base_model_prefix
    return prefix if prefix and hasattr(model, prefix) else ""


def _match_names(model: PreTrainedModel, checkpoint: Weights) -> dict[str, str]:
    """Model name -> checkpoint name for every tensor; refuse with the whole list where they disagree."""
    prefix = model.base_model_prefix
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    sources: dict[str, str] = {}
    problems: list[str] = []
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict(keep_vars=True).items()}
    for name, shape in expected.items():
        found = next((c for c in _spellings(name, prefix) if c in checkpoint.tensors), None)
        if found is None:
            if name not in tied:
                problems.append(f"{name} is missing")
            continue
        stored = tuple(checkpoint.tensors[found].shape)
        if stored != shape:
            problems.append(f"{name} has shape {list(stored)}, the config asks for {list(shape)}")
        elif name not in tied:
            sources[name] = found
    known = {c for name in expected for c in _spellings(name, prefix)}
    known |= {c for name, _ in model.named_buffers() for c in _spellings(name, prefix)}
    unexpected = [n for n in checkpoint.tensors if n not in known and not _ignorable(model, n)]
    problems += [f"{name} is not part of the model" for name in unexpected]
    if problems:
        listed = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise CheckpointError(
            f"config and tensors disagree: {listed}", checkpoint.directory, "Use the config that belongs to these weights"
        )
    return sources


def _spellings(name: str, prefix: str) -> Iterator[str]:
    """The names under which a checkpoint may store the model's tensor ``name``."""
    for candidate in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
        yield candidate
        for new, old in _LEGACY_SUFFIXES:
            if candidate.endswith(new):
                yield candidate.removesuffix(new) + old


def _ignorable(model: PreTrainedModel, name: str) -> bool:
    """Tables that old checkpoints carry and today's modules compute."""
    endings = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias", "embeddings.position_ids")
    return name.endswith(endings) and name not in dict(model.named_parameters())

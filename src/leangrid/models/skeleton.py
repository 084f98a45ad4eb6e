"""A model without its weights: modules on the meta device, tensors read from the checkpoint while they are needed.

A block is materialised, quantized, written and released before the next one, so memory grows with the largest block,
not with the model."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from leangrid.errors import ArchitectureError
from leangrid.models.discovery import Groups
from leangrid.models.entry import find_entry
from leangrid.models.expert_forms import FusedForm
from leangrid.models.experts import mixtures_in
from leangrid.models.model_class import build_empty, has_lm_head, known_type, read_model_config, with_experts_apart
from leangrid.models.model_inputs import Inputs, arguments_of, takes_argument, takes_pictures
from leangrid.models.named_linears import LinearShape, name_linears, shape_of
from leangrid.models.naming import Naming, Weights, match_names
from leangrid.models.selection import select
from leangrid.models.stored import StoredTensors, merged_mixtures, stores_experts_apart
from leangrid.storage.dtypes import plain_dtype
from leangrid.storage.safetensors import TensorInfo


class Skeleton:
    """The model's modules on the meta device, whose weights can be read and released block by block.

    Args:
        checkpoint: an opened source, whose headers were checked; or the description of one.
        compute_dtype: the dtype of materialised parameters.

    Attributes:
        config: transformers' config.
        naming: which stored tensor is which of the model (naming.py).
        notices: sentences for the user.
        stored: where each tensor of the model is (stored.py).
        model: the whole model. base: the model without its head, at the path ``prefix`` in it.
        entry: the module that is run for the walk, ``base`` for most, at ``entry_path``.
        structure: blocks, groups of linears, and what flows (discovery.py).
        blocks: the blocks, in the order of their first call.
        dtype: the dtype in which most of the weights to be quantized are stored; float32 for float64.
        sees_pictures: whether it is run on pictures (``see_pictures``).

    Raises:
        ArchitectureError: transformers does not know the model type, or its forward pass cannot be followed.
        CheckpointError: config and tensors disagree; the first differences of each kind are named.
    """

    def __init__(self, checkpoint: Weights, compute_dtype: torch.dtype = torch.float32) -> None:
        self.checkpoint = checkpoint
        self.compute_dtype = compute_dtype
        self._reading = Lock()
        known_type(checkpoint.config)
        self.config = read_model_config(checkpoint)
        # First all on the meta device: buffers grow with what the config claims, which is not checked yet.
        with torch.device("meta"):
            empty = build_empty(self.config)
        if stores_experts_apart(empty, checkpoint.tensors):
            empty = with_experts_apart(empty, keep=merged_mixtures(empty, checkpoint.tensors))
        self.naming: Naming = match_names(empty, checkpoint)
        del empty
        if self.naming.untied:
            _untie(self.config)
        self.model = with_experts_apart(build_empty(self.config, without=self.naming.absent), linears=False)
        self.prefix = _base_prefix(self.model)
        self.base: nn.Module = self.model.get_submodule(self.prefix) if self.prefix else self.model
        self.stored = StoredTensors(self.model, self.naming, checkpoint, self.model.base_model_prefix)
        self.notices = list(self.naming.notices)
        self.entry, self.structure = find_entry(self.model, self.base)
        self.blocks = [self.model.get_submodule(block.path) for block in self.structure.blocks]
        self._aliases = self._find_aliases()
        self.entry_path = next(path for path, module in self.model.named_modules() if module is self.entry)
        inside = f"{self.entry_path}." if self.entry_path else ""  # not the head, which is outside of it
        self._unused = {name for name in self.structure.unused if name.startswith(inside)}
        self.dtype = self._stored_dtype()
        self.sees_pictures = False

    def select(self, ignore: Sequence[str], only: Sequence[str]) -> None:
        """Let other linears be quantized than by default: a recipe's patterns of those that stay, and of those beside
        which all stay (selection.py). RecipeError for what cannot be."""
        if ignore or only:
            self.structure = select(self.structure, self.model, self.stored, self.naming.extra, ignore, only)
            for found in ("_linears", "names_by_shape"):
                self.__dict__.pop(found, None)
            self.dtype = self._stored_dtype()

    def block_name(self, index: int) -> str:
        """The path of block ``index`` in the model, such as ``model.layers.3``."""
        return self.structure.blocks[index].path

    @cached_property
    def block_prefixes(self) -> tuple[str, ...]:
        """The paths of the blocks with a final dot, such as ``model.layers.3.``."""
        return tuple(f"{block.path}." for block in self.structure.blocks)

    @property
    def has_experts(self) -> bool:
        """Whether there are mixtures of experts whose matrices are quantized one by one."""
        return bool(self.expert_forms)

    @cached_property
    def expert_forms(self) -> dict[str, FusedForm]:
        """The path of each mixture of experts -> how transformers' model holds its matrices."""
        return {path: mixture.form for path, mixture in mixtures_in(self.model).items()}

    @property
    def has_lm_head(self) -> bool:
        """Whether the model predicts the next token, so that it has a perplexity: a decoder with its head."""
        return self.entry in (self.base, self.model) and has_lm_head(self.model)

    @property
    def vocabulary(self) -> int:
        """Token ids that the model knows: rows of its embedding."""
        return self._embedding.shape[0]

    @property
    def positions(self) -> int | None:
        """The longest window that the model takes; None where its config sets no limit (XLNet writes -1)."""
        for config in (self.config, self.config.get_text_config(decoder=True)):
            stated = getattr(config, "max_position_embeddings", None)
            if isinstance(stated, int) and stated > 0:
                return stated
        return None

    @property
    def hidden_size(self) -> int:
        """Numbers in a token's hidden state between two blocks."""
        first = self.structure.blocks[0].returns
        while isinstance(first, list | tuple):
            first = first[0]
        return self._embedding.shape[1] if not isinstance(first, Tensor) else first.shape[-1]

    @property
    def _embedding(self) -> Tensor:
        for module in (self.base, self.model):
            with suppress(AttributeError, NotImplementedError):
                weight: Any = module.get_input_embeddings().weight  # pyright: ignore[reportCallIssue]
                if isinstance(weight, Tensor) and weight.ndim == 2:
                    return weight
        return next(module.weight for module in self.entry.modules() if isinstance(module, nn.Embedding))

    @property
    def takes_pictures(self) -> bool:
        """Whether the ``entry`` reads pictures beside text."""
        return takes_pictures(self.entry)

    def takes(self, name: str) -> bool:
        """Whether the ``entry`` has an argument of this name."""
        return takes_argument(self.entry, name)

    def see_pictures(self) -> None:
        """From now on the model is run on pictures, too: what text does not reach is loaded with the rest."""
        self.sees_pictures, self._unused = True, set()

    def run(self, inputs: Inputs, whole: bool = False) -> Any:
        """Run the ``entry`` (with ``whole`` the whole model) on token ids, int64 [windows, length], or on what its
        processor made of a row (model_inputs.py), without a cache; what it returns."""
        module = self.model if whole else self.entry
        return module(**arguments_of(module, inputs))

    def groups(self, index: int) -> Groups:
        """The linears of block ``index`` grouped by shared input, as paths from the block, in the order of the forward
        pass."""
        return self.structure.blocks[index].groups

    def linear_name(self, index: int, name: str) -> str:
        """The name under which the result holds the linear at the path ``name`` in block ``index``."""
        return self.stored.module_name(f"{self.block_name(index)}.{name}")

    def linear_names(self, index: int) -> list[str]:
        """The names in the result of the linears of block ``index`` that are quantized, in the order of the groups."""
        return [self.linear_name(index, name) for group in self.groups(index) for name in group]

    def all_linear_names(self) -> list[str]:
        """The names in the result of all linears that are quantized, block after block."""
        return list(self._linears[0])

    def path(self, linear: str) -> str:
        """The path in the model of the linear that the result calls ``linear``."""
        return self._linears[0][linear]

    @cached_property
    def _linears(self) -> tuple[dict[str, str], dict[str, LinearShape]]:
        return name_linears(self.structure, self.blocks, self.stored.module_name)

    @property
    def kept(self) -> dict[str, str]:
        """The linears of the blocks that stay as they are, by their names in the result -> why."""
        return {
            self.linear_name(index, name): why
            for index, block in enumerate(self.structure.blocks)
            for name, why in block.kept.items()
        }

    def shape(self, linear: str) -> tuple[int, int]:
        """(rows, cols) = (out_features, in_features) of a linear by its name in the result."""
        return self._linears[1][linear][0]

    def layer_kind(self, linear: str) -> str:
        """ "linear", or "conv1d" where the module stores the transposed weight; by its name in the result."""
        return self._linears[1][linear][1]

    @property
    def shapes(self) -> dict[str, LinearShape]:
        """((rows, cols), ``layer_kind``) of all linears by their names in the result, block after block."""
        return self._linears[1]

    @cached_property
    def names_by_shape(self) -> dict[LinearShape, list[str]]:
        """The linears' names by what ``shapes`` says of them, that of the first linear first."""
        found: dict[LinearShape, list[str]] = {}
        for name, both in self.shapes.items():
            found.setdefault(both, []).append(name)
        return found

    def shape_at(self, path: str) -> LinearShape:
        """(rows, cols) and the ``layer_kind`` of the linear at ``path`` in the model, quantized or not."""
        owner, _, leaf = path.rpartition(".")
        form = self.expert_forms.get(owner.rpartition(".")[0])
        if form is not None and leaf in form.leaves:
            return form.shape(leaf), "linear"
        return shape_of(self.model.get_submodule(path))

    def read(self, name: str) -> Tensor:
        """The tensor that the model calls ``name``, as the checkpoint stores it. Any thread may call this."""
        with self._reading:  # a checkpoint has one open file with one position
            return self.stored.read(name)

    def tensor_info(self, name: str) -> TensorInfo:
        """The header entry of the (first) stored tensor of what the model calls ``name``: file, dtype, shape, bytes."""
        return self.checkpoint.tensors[self.stored.place(name).stored[0]]

    def parameter_names(self) -> list[str]:
        """The names of all tensors of the model that the checkpoint holds, tied ones once."""
        return list(self.stored.places)

    def plain_tensors(
        self, index: int | None, merge_experts: bool = False
    ) -> Iterator[tuple[str, TensorInfo, Callable[[], Tensor]]]:
        """What the result holds of block ``index`` (None: of what is outside of the blocks) as it is stored: its name
        there, the header entry of the (first) stored tensor, and what reads it, after a look for NaN. With
        ``merge_experts`` experts that all stay are in the tensors of all experts that plain transformers reads."""
        prefixes = self.block_prefixes if index is None else (f"{self.block_name(index)}.",)
        names = [name for name in self.stored.places if name.startswith(prefixes) == (index is not None)]
        quantized = (
            {f"{self.block_name(index)}.{name}.weight" for group in self.groups(index) for name in group}
            if index is not None
            else set[str]()
        )
        for name, own in self.stored.copied(names, quantized, merge_experts):
            if own is None:
                yield name, self.checkpoint.tensors[name], lambda name=name: self.checkpoint.read(name)
            else:
                yield name, self.tensor_info(own), lambda own=own: self.read(own)

    def materialise(self, module: nn.Module, prefix: str, skip: tuple[str, ...] = ()) -> None:
        """Fill ``module``, which lies at the path ``prefix`` in the model, from the checkpoint, except what lies below
        one of ``skip``, paths with a final dot, and what text does not reach."""
        dot, places = f"{prefix}." if prefix else "", self.stored.places
        made: dict[int, nn.Parameter] = {}  # of parameters with several names one
        for name, parameter in list(module.named_parameters(remove_duplicate=False)):
            full = dot + name
            full = full if full in places else self._aliases.get(full, full)
            if not parameter.is_meta or full not in places or full in self._unused:
                continue
            if skip and (dot + name).startswith(skip):
                continue
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(self.read(full).to(self.compute_dtype), requires_grad=False)
            _set_parameter(module, name, made[id(parameter)])
        for name, buffer in list(module.named_buffers()):
            full = dot + name
            if full in places and not (skip and full.startswith(skip)):
                path, _, leaf = name.rpartition(".")
                held, value = module.get_submodule(path)._buffers, self.read(full).to(buffer.dtype)
                held[leaf] = value if buffer.is_meta else buffer.copy_(value)  # absent if computed of a weight

    def block_sources(self, index: int) -> list[str]:
        """The names that the tensors of block ``index`` have in the checkpoint."""
        prefix = f"{self.block_name(index)}."
        within = (place.stored for name, place in self.stored.places.items() if name.startswith(prefix))
        return list(dict.fromkeys(stored for names in within for stored in names))

    def read_block(self, index: int) -> dict[str, Tensor]:
        """The parameters of block ``index`` by their names in the block, in the compute dtype, in host memory."""
        prefix, block = f"{self.block_name(index)}.", self.blocks[index]
        self._make_linears(block)
        with self._reading:
            names = [name for name, _ in block.named_parameters() if prefix + name in self.stored.places]
        return {name: self.read(prefix + name).to(self.compute_dtype) for name in names}

    def _make_linears(self, module: nn.Module) -> None:
        """Give the experts in ``module`` their linears. Any thread may call this."""
        with self._reading:
            for mixture in mixtures_in(module).values():
                mixture.make_linears()

    @contextmanager
    def load_block(
        self, index: int, device: torch.device | str = "cpu", weights: Mapping[str, Tensor] | None = None
    ) -> Iterator[nn.Module]:
        """Context: block ``index`` with its weights on ``device``, released at the end. ``weights`` are what
        ``read_block`` gave where that was called already; None reads them."""
        block = self.blocks[index]
        try:
            self._make_linears(block)
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
        model = self.model if lm_head or self.entry is self.model else self.base
        self.materialise(model, "" if model is self.model else self.prefix, skip=self.block_prefixes)
        if lm_head:
            self.model.tie_weights()
        # What text does not reach is NaN, in no memory: a model takes its device from its first parameter, and a value
        # that is used after all shows.
        for name, parameter in list(model.named_parameters(remove_duplicate=False)):
            full = name if model is self.model or not self.prefix else f"{self.prefix}.{name}"
            if parameter.is_meta and full in self._unused and parameter.is_floating_point():
                nothing = torch.full((), torch.nan, dtype=self.compute_dtype, device=device)
                _set_parameter(model, name, nothing.expand(parameter.shape))
        for child in model.modules():
            if not any(tensor.is_meta for tensor in (*child.parameters(), *child.buffers())):
                child.to(device)
        try:
            yield model
        finally:
            for name, parameter in list(model.named_parameters(remove_duplicate=False)):
                if not parameter.is_meta:
                    _set_parameter(model, name, torch.empty_like(parameter, device="meta"))
            self.model.tie_weights()

    def release(self, module: nn.Module) -> None:
        """Free the memory of the module's parameters: they are on the meta device again, experts without linears."""
        self.stored.forget()
        with self._reading:
            for mixture in mixtures_in(module).values():
                mixture.drop_linears()
        for name, parameter in list(module.named_parameters(remove_duplicate=False)):
            _set_parameter(module, name, torch.empty_like(parameter, device="meta"))

    def _find_aliases(self) -> dict[str, str]:
        """Names of parameters under which nothing is stored -> another name of the same parameter, which is."""
        known: dict[int, str] = {}
        others: list[tuple[str, int]] = []
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if name in self.stored.places:
                known.setdefault(id(parameter), name)
            else:
                others.append((name, id(parameter)))
        return {name: known[key] for name, key in others if key in known}

    def _stored_dtype(self) -> torch.dtype:
        """The dtype of most of the weights to be quantized; float32 for float64, in which no engine computes."""
        counts: Counter[str] = Counter()
        dtypes = (self.stored.dtype(f"{path}.weight") for path in self._linears[0].values())
        for (dtype, (shape, _)), count in Counter(zip(dtypes, self.shapes.values(), strict=True)).items():
            counts[dtype] += count * math.prod(shape)
        if not counts:
            raise ArchitectureError(
                "none of its linears can be quantized", type(self.model).__name__, "See leangrid plan for what stays"
            )
        return plain_dtype(counts.most_common(1)[0][0]) or torch.float32


def _set_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path) if path else module
    owner._parameters[leaf] = value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)


def _untie(config: PreTrainedConfig) -> None:
    for section in (config, config.get_text_config()):
        section.tie_word_embeddings = False  # pyright: ignore[reportAttributeAccessIssue]


def _base_prefix(model: PreTrainedModel) -> str:
    prefix = model.base_model_prefix
    return prefix if prefix and hasattr(model, prefix) else ""

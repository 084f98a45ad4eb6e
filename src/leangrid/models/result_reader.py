"""Reading a result of ``quantize``: what is stored how, and each layer's codes, grid and weight.

Opening it reads headers only; a layer's tensors are read when it is asked for."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from transformers import PreTrainedModel

from leangrid.errors import CheckpointError, FormatError
from leangrid.formats import CONFIG_KEYS, format_of, schemes_of
from leangrid.formats.base import Reading
from leangrid.formats.checks import holds_codes
from leangrid.grids import Grid
from leangrid.models.conversion import Conversion
from leangrid.models.conversion_names import ResultNames
from leangrid.models.experts import Experts
from leangrid.models.linears import has_matrix, linear_shapes
from leangrid.models.model_class import described_model, has_lm_head, with_experts_apart
from leangrid.models.plain_readers import plain_reading
from leangrid.models.result_names import match_result
from leangrid.models.stored import merged_mixtures
from leangrid.schemes import Scheme
from leangrid.storage.dtypes import NAMES, dtype_of
from leangrid.storage.manifest import read_manifest, require_unchanged
from leangrid.storage.safetensors import TensorInfo
from leangrid.storage.source import open_source

_WEIGHT = ".weight"


class ResultReader:
    """A result's directory, finished or still staged, opened for reading.

    Attributes:
        directory: where it lies.
        checkpoint: its tensors, config.json and side files.
        dtype: of every tensor that is not quantized.
        format: the container of the quantized layers.
        layers: name -> (rows, cols) = (out_features, in_features) of every quantized linear, in the model's order.
        schemes: name -> the scheme that the files say for it.
        not_in_model: names of tensors that are no part of the model, copied from the source as they were.
        ignore: names of the modules with a matrix that is not quantized, in the files and in the model, and of the
            modules of ``not_in_model``.
        has_lm_head: whether the model has a language-model head.
        expert_forms: path of each mixture of experts that is stored one by one -> how transformers' model holds it.
        kinds: name -> "linear" or "conv1d", of every linear of which something is stored.
    """

    def __init__(self, directory: Path) -> None:
        """Open ``directory`` as it is; ``verified`` opens it after comparing it with its manifest.

        Raises:
            FormatError: it is not quantized, or in a way that leangrid does not read.
            CheckpointError: config.json and the tensors disagree.
        """
        self.directory, self.checkpoint = directory, open_source(directory, allow_quantized=True)
        config = self.checkpoint.config
        entry = next((config[key] for key in CONFIG_KEYS if key in config), None)
        if not isinstance(entry, dict):
            raise FormatError("the model is not quantized", directory, "Give a result of leangrid quantize")
        self.format = format_of(entry)
        empty, model = described_model(config), with_experts_apart(described_model(config))
        self._paths = match_result(empty, model, self.checkpoint.tensors)
        shapes = linear_shapes(model)
        linears = {name: shapes[path] for name, path in self._paths.items()}
        self.layers: dict[str, tuple[int, int]] = {}
        self.kinds = {name: kind for name, (_, kind) in linears.items()}
        self.schemes: dict[str, Scheme] = {}
        for name, scheme in schemes_of(entry, linears).items():
            shape = linears[name][0]
            if holds_codes(self.checkpoint.tensors, name, self.format.layout(scheme, shape, torch.float32)):
                self.layers[name], self.schemes[name] = shape, scheme
        if not self.layers:
            what = "none of the model's linears is stored quantized"
            raise CheckpointError(what, directory, "The config does not belong to these weights")
        self._conversion, self._model = Conversion(empty, {}), model
        whole = merged_mixtures(empty, self.checkpoint.tensors)  # experts that are not quantized
        mixtures = ((path, one) for path, one in model.named_modules() if isinstance(one, Experts))
        self.expert_forms = {path: one.form for path, one in mixtures if path not in whole}
        self.not_in_model = frozenset(_beside(self._conversion, model, self.checkpoint.tensors, self._paths))
        self.ignore = sorted(self._staying(model) | {name.rpartition(".")[0] for name in self.not_in_model})
        self.has_lm_head = has_lm_head(model)
        self.dtype = self._dtype()

    @classmethod
    def verified(cls, directory: Path) -> "ResultReader":
        """Open the finished ``directory`` after comparing every file with its manifest.

        Raises:
            VerifyError: it is not finished, or differs from its manifest: the first differences are named.
            FormatError, CheckpointError: as the constructor.
        """
        require_unchanged(directory)
        return cls(directory)

    def _staying(self, model: PreTrainedModel) -> set[str]:
        """The names of the matrices that are not quantized: those of the files, and the paths in ``model``."""
        matrices = {path for path, module in model.named_modules() if has_matrix(module)}
        owners = {name.removesuffix(_WEIGHT) for name in self.checkpoint.tensors if name.endswith(_WEIGHT)}
        others = owners - matrices - self._paths.keys()
        stored = {name for name in others if self._conversion.rename_to_module(name) in matrices}
        quantized = self.layers.keys() | {self._paths[name] for name in self.layers}
        return (matrices | stored | self.kinds.keys()) - quantized

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """The manifest of a finished result."""
        return read_manifest(self.directory)

    @property
    def scheme(self) -> Scheme:
        """The one scheme of all layers; FormatError where they have several."""
        several = list(dict.fromkeys(self.schemes.values()))
        if len(several) > 1:
            what = f"the layers have {len(several)} schemes, and this container holds one"
            raise FormatError(what, self.directory, "Use format compressed-tensors or dense")
        return several[0]

    def layer(self, name: str) -> tuple[UInt8[Tensor, "rows cols"], Grid]:
        """Codes and grid of a quantized linear; CheckpointError where its tensors are damaged."""
        return self.format.unpack(self._stored(name), self.schemes[name], self.layers[name], name)

    def weight(self, name: str) -> Float[Tensor, "rows cols"]:
        """The weight of a quantized linear as readers of its container compute it, in the dtype in which they do."""
        return self.format.dense(self._stored(name), self.schemes[name], self.layers[name], name)

    def weight_in_model_dtype(self, name: str) -> Float[Tensor, "rows cols"]:
        """The weight of a quantized linear in ``dtype``, computed in float32 and rounded once."""
        codes, grid = self.layer(name)
        return self.format.dequantize(codes, grid, self.dtype).to(self.dtype)

    def name_of(self, path: str) -> str | None:
        """The name in the files of the linear at ``path`` in the model; None where nothing of it is stored."""
        return next((name for name, own in self._paths.items() if own == path), None)

    def path_of(self, name: str) -> str:
        """The path in the model of the linear that the files call ``name``."""
        return self._paths[name]

    def renamed(self, name: str) -> str:
        """The path that transformers itself gives to what the files call ``name``."""
        return self._conversion.rename_to_module(name)

    def reading(self, schemes: Mapping[str, Scheme]) -> Reading:
        """How plain transformers reads these layers packed by these schemes under their names."""
        paths = {name: self._paths[name] for name in self.layers}
        mixtures = {path: form.linears for path, form in self.expert_forms.items()}
        return plain_reading(ResultNames(self._conversion), paths, mixtures, schemes)

    def plain_tensors(self) -> dict[str, TensorInfo]:
        """Every tensor that is no part of a quantized weight (embeddings, norms, biases, the head), by name."""
        packed = {f"{name}.{suffix}" for name in self.layers for suffix in self._suffixes(name)}
        return {name: info for name, info in self.checkpoint.tensors.items() if name not in packed}

    def _suffixes(self, name: str) -> list[str]:
        return list(self.format.layout(self.schemes[name], self.layers[name], self.dtype))

    def _stored(self, name: str) -> dict[str, Tensor]:
        return {suffix: self.checkpoint.read(f"{name}.{suffix}", check=False) for suffix in self._suffixes(name)}

    def _dtype(self) -> torch.dtype:
        name = self.checkpoint.config.get("dtype") or self.checkpoint.config.get("torch_dtype")
        dtype = dtype_of(name)
        if dtype is None or not dtype.is_floating_point:
            raise CheckpointError(f"dtype is {name!r}", f"{self.directory / 'config.json'}: dtype", "Quantize again")
        return dtype


def _beside(
    conversion: Conversion, model: PreTrainedModel, stored: Iterable[str], paths: Mapping[str, str]
) -> Iterator[str]:
    """The names of stored tensors of modules that the model does not have."""
    modules = {path for path, _ in model.named_modules()}
    for name in stored:
        owner = name.rpartition(".")[0]
        if owner not in modules and owner not in paths:
            renamed = conversion.rename_to_module(owner)
            if renamed not in modules and renamed.rpartition(".")[0] not in modules:
                yield name


class DequantizedResult:
    """A result as the checkpoint of a plain model (``models.naming.Weights``): each packed linear is checked and
    dequantized when it is read."""

    def __init__(self, result: ResultReader, expected: Iterable[str]) -> None:
        """``expected``: the linears that must be stored quantized; CheckpointError where one is not."""
        for name in expected:
            if name not in result.layers:
                raise CheckpointError("is not stored quantized", name, "Quantize again")
        self._result, self._files = result, result.checkpoint
        self.directory: Path = result.directory
        self.notices: Sequence[str] = result.checkpoint.notices
        self.config = {key: value for key, value in result.checkpoint.config.items() if key not in CONFIG_KEYS}
        self.tensors: Mapping[str, TensorInfo] = result.plain_tensors() | {
            f"{name}.weight": TensorInfo(
                result.directory, NAMES[result.dtype], shape if result.kinds[name] == "linear" else shape[::-1], 0, 0
            )
            for name, shape in result.layers.items()
        }

    def read(self, name: str) -> Tensor:
        """One tensor of the plain model; CheckpointError where what is stored for it is damaged."""
        layer = name.removesuffix(".weight")
        if name == layer or layer not in self._result.layers:
            return self._files.read(name)
        weight = self._result.weight(layer)
        return (weight if self._result.kinds[layer] == "linear" else weight.t()).contiguous()

    def tensors_equal(self, one: str, other: str) -> bool:
        """Whether two tensors that are stored as they are hold the same values."""
        return self._files.tensors_equal(one, other)

    def close(self) -> None:
        """Close the file that is held open."""
        self._files.close()

"""A finished result, verified and open: what every export starts from. Layer by layer; nothing is loaded that is not
asked for."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from leangrid.errors import CheckpointError, FormatError
from leangrid.formats import Format, format_of, schemes_of
from leangrid.grids import Grid
from leangrid.models.architectures import Architecture, architecture_of
from leangrid.models.skeleton import described_model, linear_shapes
from leangrid.recipe import Scheme
from leangrid.storage.safetensors import DTYPES, TensorInfo
from leangrid.storage.source import Checkpoint, open_source
from leangrid.storage.writer import MANIFEST, require_sound


@dataclass(frozen=True, eq=False)
class Finished:
    """One finished directory.

    Attributes:
        checkpoint: its tensors and side files. manifest: as written, verified.
        architecture: where the blocks are, and how linears are stored. dtype: D, of everything that is not quantized.
        format, schemes: how the layers are stored, layer by layer.
        layers: name -> (rows, cols) = (out_features, in_features) of every quantized linear, in the model's order.
        ignore: names of the nn.Linear that are not quantized, and of what is no part of the model.
        predicts: whether it has a language-model head.
        beyond: tensors that are no part of the model, copied from its source as they were (models/naming.py).
    """

    checkpoint: Checkpoint
    manifest: dict[str, Any]
    architecture: Architecture
    dtype: torch.dtype
    format: Format
    schemes: dict[str, Scheme]
    layers: dict[str, tuple[int, int]]
    ignore: list[str]
    beyond: frozenset[str] = frozenset()
    predicts: bool = True

    @classmethod
    def open(cls, directory: Path) -> "Finished":
        """Open ``directory`` after holding every file against its manifest.

        Raises:
            VerifyError: it is not finished, or differs from its manifest: the first differences are named.
            FormatError: it is not quantized, or in a way that leangrid does not read.
            CheckpointError: config and tensors disagree.
        """
        require_sound(directory)
        checkpoint = open_source(directory, allow_quantized=True)
        stored = checkpoint.config.get("quantization_config")
        if not isinstance(stored, dict):
            raise FormatError("the model is not quantized", directory, "Give a result of leangrid quantize")
        container, architecture = format_of(stored), architecture_of(checkpoint.config)
        model = described_model(checkpoint.config)
        linears, layers = linear_shapes(model), {}
        schemes = schemes_of(stored, linears)
        for name, scheme in list(schemes.items()):
            if _holds(checkpoint, name, container.layout(scheme, linears[name][0], torch.float32)):
                layers[name] = linears[name][0]
            else:
                del schemes[name]
        if not layers:
            what = "none of the model's linears is stored quantized"
            raise CheckpointError(what, directory, "The config does not belong to these weights")
        modules = {path for path, _ in model.named_modules()}
        beyond = frozenset(name for name in checkpoint.tensors if name.rpartition(".")[0] not in modules)
        predicts = architecture.kind == "decoder" and bool(model.can_generate())
        kept = {name for name, (_, kind) in linears.items() if kind == "linear" and name not in layers}
        ignore = sorted(kept | {name.rpartition(".")[0] for name in beyond})
        manifest = json.loads((directory / MANIFEST).read_bytes())
        return cls(
            checkpoint, manifest, architecture, _dtype(checkpoint), container, schemes, layers, ignore, beyond, predicts
        )

    @property
    def directory(self) -> Path:
        """Where it lies."""
        return self.checkpoint.directory

    @property
    def scheme(self) -> Scheme:
        """The one scheme of all layers; FormatError where they have several."""
        several = list(dict.fromkeys(self.schemes.values()))
        if len(several) > 1:
            what = f"the layers have {len(several)} schemes, and this container holds one"
            raise FormatError(what, self.directory, "Use format compressed-tensors or dense")
        return several[0]

    def layer(self, name: str) -> tuple[UInt8[Tensor, "rows cols"], Grid]:
        """Codes and grid of a quantized linear, checked by its container; CheckpointError where they are damaged."""
        shape = self.layers[name]
        tensors = {suffix: self.checkpoint.read(f"{name}.{suffix}", check=False) for suffix in self._suffixes(name)}
        return self.format.unpack(tensors, self.schemes[name], shape, name)

    def dense(self, name: str) -> Float[Tensor, "rows cols"]:
        """The weight of a quantized linear that every reader in D must arrive at: computed in float32, rounded once."""
        codes, grid = self.layer(name)
        return grid.dequantize(codes).to(self.format.precision(self.dtype).dtype).to(self.dtype)

    def _suffixes(self, name: str) -> list[str]:
        return list(self.format.layout(self.schemes[name], self.layers[name], self.dtype))

    def others(self) -> dict[str, TensorInfo]:
        """Every tensor that is no part of a quantized weight (embeddings, norms, biases, the head), by name."""
        packed = {f"{name}.{suffix}" for name in self.layers for suffix in self._suffixes(name)}
        return {name: info for name, info in self.checkpoint.tensors.items() if name not in packed}


def _holds(checkpoint: Checkpoint, name: str, layout: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> bool:
    """Whether the file has the layer's codes: some containers say "every Linear but these"."""
    stored = ((checkpoint.tensors.get(f"{name}.{suffix}"), dtype) for suffix, (dtype, _) in layout.items())
    return any(
        info is not None and dtype == info.torch_dtype and dtype in (torch.int32, torch.uint32, torch.uint8)
        for info, dtype in stored
    )


def _dtype(checkpoint: Checkpoint) -> torch.dtype:
    """D: what config.json says; for older results the dtype of the embedding."""
    name = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    known = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values() if dtype.is_floating_point}
    if name not in known:
        raise CheckpointError(f"dtype is {name!r}", f"{checkpoint.directory / 'config.json'}: dtype", "Quantize again")
    return known[str(name)]

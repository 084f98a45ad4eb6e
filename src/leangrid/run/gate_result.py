"""The finished files as the weights of a dense model, for the gate."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leangrid.errors import CheckpointError
from leangrid.formats import CONFIG_KEYS, format_of, schemes_of
from leangrid.models.skeleton import Skeleton
from leangrid.storage.safetensors import TensorInfo
from leangrid.storage.source import open_source

_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}


class Reopened:
    """A finished directory as the weights of a dense model: packed linears are checked and dequantized as they are
    read."""

    def __init__(self, directory: Path, original: Skeleton) -> None:
        self._files = open_source(directory, allow_quantized=True)
        stored = next((self._files.config[key] for key in CONFIG_KEYS if key in self._files.config), None)
        if not isinstance(stored, dict):
            raise CheckpointError("there is no quantization_config", directory / "config.json")
        self._format = format_of(stored)
        self._turned = original.architecture.layer == "conv1d"
        self.directory, self.notices = directory, self._files.notices
        self.config: dict[str, Any] = {
            key: value for key, value in self._files.config.items() if key not in CONFIG_KEYS
        }
        self._shapes = {
            name: original.shape(name) for i in range(len(original.blocks)) for name in original.linear_names(i)
        }
        self._schemes = schemes_of(stored, self._shapes)
        self._parts: dict[str, dict[str, str]] = {name: {} for name in self._shapes}
        self.tensors: dict[str, TensorInfo] = {}
        for name, info in self._files.tensors.items():
            owner, _, suffix = name.rpartition(".")
            if owner in self._parts and suffix != "bias":
                self._parts[owner][suffix] = name
            else:
                self.tensors[name] = info
        for name, (rows, cols) in self._shapes.items():
            shape = (cols, rows) if self._turned else (rows, cols)
            self.tensors[f"{name}.weight"] = TensorInfo(directory, _NAMES[original.dtype], shape, 0, 0)

    def read(self, name: str) -> Tensor:
        """One tensor of the dense model; CheckpointError where its packed parts are not sound."""
        owner = name.removesuffix(".weight")
        if owner not in self._parts:
            return self._files.read(name)
        packed = {suffix: self._files.read(part) for suffix, part in self._parts[owner].items()}
        weight = self._format.dense(packed, self._schemes[owner], self._shapes[owner], owner)
        return weight.t().contiguous() if self._turned else weight

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors that are stored as they are hold the same values."""
        return self._files.equal(one, other)

    def close(self) -> None:
        """Close the file that is held open."""
        self._files.close()

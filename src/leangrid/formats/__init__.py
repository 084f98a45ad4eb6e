"""On-disk containers: (codes, grid) of a layer <-> named tensors. Pure: no file, no model.

To add one, add its file with the functions of ``Format`` and its row in ``FORMATS``.
"""

from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from leangrid.errors import FormatError
from leangrid.formats import awq, compressed_tensors, gptq, lut, mlx
from leangrid.grids import Grid, Precision
from leangrid.recipe import Scheme

LayerKind = Literal["linear", "conv1d"]


@runtime_checkable
class Format(Protocol):
    """What a container can do. ``shape`` is always (rows, cols) = (out_features, in_features) of the layer."""

    QUANT_METHOD: str

    def refuse(self, scheme: Scheme, name: str, rows: int, cols: int, kind: str = "linear") -> str | None:
        """Why the container cannot hold this layer exactly, and the way out; None if it can."""
        ...

    def stored(self, scheme: Scheme, columns: set[int]) -> Scheme:
        """The scheme that the files will say for a result of ``scheme`` whose layers have these numbers of columns: the same levels,
        perhaps in shorter groups."""
        ...

    def precision(self, dtype: torch.dtype) -> Precision:
        """How a grid's parameters are kept for a model of ``dtype``: the search rounds them so before it propagates an error."""
        ...

    def layout(self, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """The tensors of a layer: suffix -> (dtype, shape)."""
        ...

    def pack(self, codes: Tensor, grid: Grid, dtype: torch.dtype, scheme: Scheme) -> dict[str, Tensor]:
        """codes uint8 [rows, cols] and their grid -> the layer's tensors by suffix. FormatError where ``dtype`` would round."""
        ...

    def check(self, tensors: dict[str, Tensor], scheme: Scheme, shape: tuple[int, int], name: str) -> None:
        """CheckpointError if a tensor is absent, has another shape or dtype, or holds values no writer makes."""
        ...

    def unpack(self, tensors: dict[str, Tensor], scheme: Scheme, shape: tuple[int, int], name: str = "layer") -> tuple[Tensor, Grid]:
        """The inverse of ``pack``, after ``check``."""
        ...

    def dense(self, tensors: dict[str, Tensor], scheme: Scheme, shape: tuple[int, int], name: str = "layer") -> Tensor:
        """The weight [rows, cols] that every reader must arrive at, in the stored dtype."""
        ...

    def config(self, scheme: Scheme, layers: list[str], ignore: list[str], dtype: torch.dtype) -> dict[str, Any]:
        """config.json's ``quantization_config``."""
        ...

    def scheme_of(self, config: dict[str, Any]) -> Scheme:
        """The scheme that a ``quantization_config`` describes; FormatError if it is none of ours."""
        ...

    def covers(self, config: dict[str, Any], name: str) -> bool:
        """Whether the linear ``name`` is stored quantized under this ``quantization_config``."""
        ...


FORMATS: dict[str, Format] = {
    "compressed-tensors": compressed_tensors,
    "lut": lut,
    "gptq": gptq.V2,
    "gptq_v1": gptq.V1,
    "awq": awq,
    "mlx": mlx,
}
EXPORT_ONLY = frozenset({"gptq_v1"})  # a search may choose what they cannot say (Z = 0): a finished result shows whether it did
CONFIG_KEYS = ("quantization_config", "quantization")  # of config.json: transformers' and mlx-lm's


def format_of(config: dict[str, Any]) -> Format:
    """The container that wrote a ``quantization_config``; FormatError names an unknown one."""
    method = mlx.QUANT_METHOD if mlx.is_config(config) else config.get("quant_method")
    if method == gptq.QUANT_METHOD:
        return gptq.version_of(config)
    by_method = {known.QUANT_METHOD: known for known in FORMATS.values()}
    if method in by_method:
        return by_method[method]
    known = ", ".join(by_method)
    raise FormatError(f"quant_method {method!r} is not one that leangrid reads", "config.json: quantization_config", f"Known: {known}")


def config_entries(name: str, stored: dict[str, Any]) -> dict[str, Any]:
    """What config.json gets of ``FORMATS[name].config``: mlx-lm looks under a key of its own first."""
    return {"quantization": stored, "quantization_config": stored} if name == "mlx" else {"quantization_config": stored}

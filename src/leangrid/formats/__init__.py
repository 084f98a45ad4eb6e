"""On-disk containers: (codes, grid) of a layer <-> named tensors. Pure: no file, no model.

To add one, add its file with the functions of ``Format`` and its row in ``FORMATS``.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from leangrid.errors import FormatError
from leangrid.formats import awq, compressed_tensors, gguf, gptq, lut, mlx
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
        """The scheme that the files will say for a result of ``scheme`` whose layers have these numbers of columns: the
        same levels, perhaps in shorter groups."""
        ...

    def precision(self, dtype: torch.dtype) -> Precision:
        """How a grid's parameters are kept for a model of ``dtype``: the search rounds them so before it propagates an
        error."""
        ...

    def layout(
        self, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """The tensors of a layer: suffix -> (dtype, shape)."""
        ...

    def pack(self, codes: Tensor, grid: Grid, dtype: torch.dtype, scheme: Scheme) -> dict[str, Tensor]:
        """codes uint8 [rows, cols] and their grid -> the layer's tensors by suffix. FormatError where ``dtype`` would
        round."""
        ...

    def check(self, tensors: dict[str, Tensor], scheme: Scheme, shape: tuple[int, int], name: str) -> None:
        """CheckpointError if a tensor is absent, has another shape or dtype, or holds values no writer makes."""
        ...

    def unpack(
        self, tensors: dict[str, Tensor], scheme: Scheme, shape: tuple[int, int], name: str = "layer"
    ) -> tuple[Tensor, Grid]:
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
    "gguf": gguf,
}
EXPORT_ONLY = frozenset(
    {"gptq_v1"}
)  # a search may choose what they cannot say (Z = 0): a finished result shows whether it did
CONFIG_KEYS = ("quantization_config", "quantization")  # of config.json: transformers' and mlx-lm's


def stored_as(container: Format, layers: Mapping[str, tuple[Scheme, int]]) -> dict[str, Scheme]:
    """Layer -> the scheme that ``container`` will say for it; ``layers`` has each one's own scheme and number of
    columns."""
    columns: dict[Scheme, set[int]] = {}
    for scheme, cols in layers.values():
        columns.setdefault(scheme, set()).add(cols)
    said = {scheme: container.stored(scheme, found) for scheme, found in columns.items()}
    return {name: said[scheme] for name, (scheme, _) in layers.items()}


def config_of(
    container: Format, schemes: Mapping[str, Scheme], ignore: list[str], dtype: torch.dtype
) -> dict[str, Any]:
    """``quantization_config`` for layers of one scheme or several; FormatError where a container holds one only."""
    several = list(dict.fromkeys(schemes.values()))
    if len(several) == 1:
        return container.config(several[0], list(schemes), ignore, dtype)
    if container is mlx:
        return mlx.mixed_config(schemes)
    if container is not compressed_tensors:
        name = next(name for name, known in FORMATS.items() if known is container)
        raise FormatError(
            f"{name} holds one scheme for all layers, not {len(several)}",
            "layers",
            "Use format compressed-tensors or mlx",
        )
    return compressed_tensors.mixed_config(schemes, ignore)


def schemes_of(config: dict[str, Any], names: Iterable[str]) -> dict[str, Scheme]:
    """Layer -> scheme for those of ``names`` that a ``quantization_config`` covers; FormatError if it is none of
    ours."""
    container = format_of(config)
    covered = [name for name in names if container.covers(config, name)]
    if container is compressed_tensors and len(config.get("config_groups") or {}) > 1:
        return compressed_tensors.mixed_schemes(config, covered)
    if container is mlx:
        return mlx.schemes(config, covered)
    return dict.fromkeys(covered, container.scheme_of(config))


def format_of(config: dict[str, Any]) -> Format:
    """The container that wrote a ``quantization_config``; FormatError names an unknown one."""
    method = mlx.QUANT_METHOD if mlx.is_config(config) else config.get("quant_method")
    if gguf.is_config(config):
        return gguf
    if method == gptq.QUANT_METHOD:
        return gptq.version_of(config)
    by_method = {known.QUANT_METHOD: known for known in FORMATS.values() if known is not gguf}
    if method in by_method:
        return by_method[method]
    known = ", ".join(by_method)
    raise FormatError(
        f"quant_method {method!r} is not one that leangrid reads", "config.json: quantization_config", f"Known: {known}"
    )


def config_entries(name: str, stored: dict[str, Any]) -> dict[str, Any]:
    """What config.json gets of ``FORMATS[name].config``: mlx-lm looks under a key of its own first."""
    return {"quantization": stored, "quantization_config": stored} if name == "mlx" else {"quantization_config": stored}

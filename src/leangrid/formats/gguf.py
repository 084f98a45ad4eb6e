"""llama.cpp's blocks in a Hugging Face directory: each layer's rows as the bytes that a GGUF file of the model will
hold.

``leangrid export --to gguf`` copies them into one file, unchanged. Layers whose columns 256 does not divide hold the
narrow type of their width (block_types.py), so one name says all. ``weight`` is uint8 [rows, bytes of a row]: a reader
that expects weights meets the wrong dtype and shape, and stops."""

from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from leangrid.block_types import BLOCK_TYPES, BlockType
from leangrid.errors import CheckpointError, FormatError
from leangrid.formats import gguf_blocks
from leangrid.formats.checks import check_layout
from leangrid.formats.gguf_blocks import Parts
from leangrid.grids import AffineGrid, Grid, GroupedGrid, OffsetGrid, Precision, SuperblockGrid
from leangrid.recipe import Scheme

QUANT_METHOD: str = "leangrid"
NAME, VERSION = "gguf", 1
_WHERE = "config.json: quantization_config"


def refuse(scheme: Scheme, name: str, rows: int, cols: int, kind: str = "linear") -> str | None:
    """Schemes that are no block type, GPT-2's Conv1D, and rows that 32 does not divide."""
    if scheme.block is None:
        return f"{name}: format gguf holds llama.cpp's block types. Use scheme Q4_K or Q4_0, or export a finished affine result to gguf"
    if kind == "conv1d":
        return f"{name} is a Conv1D, which llama.cpp's files hold transposed. Use scheme NU4 (format lut)"
    if cols % 32:
        return (
            f"{name}: llama.cpp's blocks of 32 do not divide its {cols} columns. Use scheme W{min(scheme.bits, 4)}A16"
        )
    return None


def stored(scheme: Scheme, columns: set[int]) -> Scheme:
    """As it is."""
    return scheme


def precision(dtype: torch.dtype) -> Precision:
    """Readers compute in float32; what the blocks themselves round, their grids already have."""
    return Precision(torch.float32)


def _type(scheme: Scheme, cols: int) -> BlockType:
    if scheme.block is None:
        raise FormatError("format gguf holds llama.cpp's block types", None, "Use a scheme such as Q4_K")
    return BLOCK_TYPES[scheme.block].fitting(cols)


def layout(
    scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """weight: uint8 [rows, bytes of a row]."""
    return {"weight": (torch.uint8, (shape[0], _type(scheme, shape[1]).row_bytes(shape[1])))}


def pack(codes: UInt8[Tensor, "rows cols"], grid: Grid, dtype: torch.dtype, scheme: Scheme) -> dict[str, Tensor]:
    """codes and the grid of the layer's block type -> {"weight"}. FormatError for another grid, or one that its fields
    cannot hold."""
    kind = _type(scheme, codes.shape[1])
    if not isinstance(grid, GroupedGrid) or (grid.bits, grid.group_size) != (kind.bits, kind.group):
        raise FormatError(
            f"{kind.name} holds groups of {kind.group} at {kind.bits} bits, not {type(grid).__name__}",
            None,
            "Use its scheme",
        )
    if isinstance(grid, SuperblockGrid) and grid.kind is kind:
        more = (grid.dmin, grid.sub_scale, grid.sub_min) if kind.minimum else (None, grid.sub_scale, None)
        parts = Parts(codes, grid.d, *more)
    elif (
        isinstance(grid, AffineGrid)
        and not kind.minimum
        and not kind.sc
        and bool((grid.zero_point == kind.middle).all())
    ):
        parts = Parts(codes, grid.scale)
    elif isinstance(grid, OffsetGrid) and kind.minimum and not kind.sc:
        parts = Parts(codes, grid.scale, grid.offset)
    else:
        raise FormatError(f"{kind.name} does not hold a {type(grid).__name__}", None, f"Use scheme {kind.name}")
    return {"weight": gguf_blocks.pack(kind, parts)}


def check(tensors: dict[str, Tensor], scheme: Scheme, shape: tuple[int, int], name: str) -> None:
    """CheckpointError unless the bytes have their shape and hold finite numbers, and scales that are not 0."""
    unpack(tensors, scheme, shape, name)


def unpack(
    tensors: dict[str, Tensor], scheme: Scheme, shape: tuple[int, int], name: str = "layer"
) -> tuple[Tensor, GroupedGrid]:
    """The layer's bytes -> (codes uint8 [rows, cols], grid); checked."""
    check_layout(tensors, layout(scheme, shape, torch.float32), name)
    kind = _type(scheme, shape[1])
    parts = gguf_blocks.unpack(kind, tensors["weight"])
    if (
        not bool(parts.d.isfinite().all())
        or not bool((parts.d != 0).all())
        or (parts.sc is not None and not bool((parts.sc != 0).all()))
    ):
        raise CheckpointError(
            "a block's scale is NaN, infinite or 0", f"{name}.weight", "The file is damaged: quantize or copy it again"
        )
    if parts.dmin is not None and not bool(parts.dmin.isfinite().all()):
        raise CheckpointError(
            "a block's minimum is NaN or infinite", f"{name}.weight", "The file is damaged: quantize or copy it again"
        )
    if parts.sc is not None:
        dmin = torch.zeros_like(parts.d) if parts.dmin is None else parts.dmin
        sub_min = torch.zeros_like(parts.sc) if parts.m is None else parts.m
        return parts.codes, SuperblockGrid(kind=kind, d=parts.d, dmin=dmin, sub_scale=parts.sc, sub_min=sub_min)
    if parts.dmin is not None:
        return parts.codes, OffsetGrid(parts.d, parts.dmin, kind.bits, kind.group)
    return parts.codes, AffineGrid(
        parts.d, torch.full_like(parts.d, kind.middle).to(torch.uint8), kind.bits, kind.group
    )


def dense(tensors: dict[str, Tensor], scheme: Scheme, shape: tuple[int, int], name: str = "layer") -> Tensor:
    """The weight [rows, cols], float32, that llama.cpp's own dequantizer arrives at."""
    codes, grid = unpack(tensors, scheme, shape, name)
    return grid.dequantize(codes)


def config(scheme: Scheme, layers: list[str], ignore: list[str], dtype: torch.dtype) -> dict[str, Any]:
    """``quantization_config``: the type asked for, and the layers by name, so that a lost one is noticed."""
    return {
        "quant_method": QUANT_METHOD,
        "format": NAME,
        "version": VERSION,
        "type": scheme.block,
        "layers": list(layers),
    }


def is_config(config: dict[str, Any]) -> bool:
    """Whether a ``quantization_config`` of ours is this container's."""
    return config.get("quant_method") == QUANT_METHOD and config.get("format") == NAME


def scheme_of(config: dict[str, Any]) -> Scheme:
    """The scheme of a ``quantization_config`` written by ``config``."""
    kind, layers = config.get("type"), config.get("layers")
    if config.get("version") != VERSION or not isinstance(kind, str) or kind not in BLOCK_TYPES:
        raise FormatError(
            f"type {kind!r} of version {config.get('version')!r} is not known", _WHERE, "Upgrade leangrid"
        )
    if not isinstance(layers, list) or not layers or not all(isinstance(name, str) for name in layers):
        raise FormatError(
            "layers must list the quantized layers", _WHERE, "The config is damaged: quantize or copy it again"
        )
    return Scheme.of_block(BLOCK_TYPES[kind])


def covers(config: dict[str, Any], name: str) -> bool:
    """Whether ``name`` is listed."""
    return name in config["layers"]

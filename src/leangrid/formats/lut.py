"""The LUT container: codes packed at b bits and one look-up table a row. Specified in docs/formats.md.

The packed codes are called ``weight`` on purpose: a reader that does not know the format asks for a float [rows, cols],
meets an int32 [rows, ceil(cols*b/32)], and stops, instead of leaving the layer at random values.
"""

from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from leangrid.errors import CheckpointError, FormatError
from leangrid.formats.bit_stream import pack as pack_bits
from leangrid.formats.bit_stream import packed_width
from leangrid.formats.bit_stream import unpack as unpack_bits
from leangrid.formats.checks import check_layout, check_padding, exactly
from leangrid.grids import Grid, NonuniformGrid, Precision
from leangrid.recipe import Scheme

QUANT_METHOD: str = "leangrid"
VERSION = 1


def refuse(scheme: Scheme, name: str, rows: int, cols: int, kind: str = "linear") -> str | None:
    """Only affine schemes are refused: a table a row would be a detour for them. nn.Linear and Conv1D both fit."""
    if scheme.grid != "nonuniform":
        return f"{name}: format lut holds non-uniform grids, not an affine one. Use NU{min(scheme.bits, 4)}, or format compressed-tensors"
    return None


def stored(scheme: Scheme, columns: set[int]) -> Scheme:
    """The same."""
    return scheme


def precision(dtype: torch.dtype) -> Precision:
    """``dtype``: everything is stored in the model's."""
    return Precision(dtype)


def layout(
    scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """weight: int32 [rows, ceil(cols*bits/32)]; lut: ``dtype`` [rows, 2^bits]."""
    rows, cols = shape
    return {"weight": (torch.int32, (rows, packed_width(cols, scheme.bits))), "lut": (dtype, (rows, scheme.levels))}


def pack(codes: UInt8[Tensor, "rows cols"], grid: Grid, dtype: torch.dtype, scheme: Scheme) -> dict[str, Tensor]:
    """codes and a grid with levels [rows, 2^bits] -> {"weight", "lut"}. FormatError if ``dtype`` would round a
    level."""
    if not isinstance(grid, NonuniformGrid) or grid.levels.shape[1] != scheme.levels:
        what = f"format lut holds non-uniform grids of {scheme.levels} levels here, not {type(grid).__name__} of {grid.bits} bits"
        raise FormatError(what, None, "Use format compressed-tensors for affine grids")
    tensors = {"weight": pack_bits(codes, scheme.bits), "lut": exactly(grid.levels, dtype, "levels")}
    check(tensors, scheme, (codes.shape[0], codes.shape[1]), "the packed layer")
    return tensors


def check(tensors: dict[str, Tensor], scheme: Scheme, shape: tuple[int, int], name: str) -> None:
    """CheckpointError unless shapes and dtypes are right, tables finite and ascending, and padding bits zero."""
    check_layout(tensors, layout(scheme, shape, tensors["lut"].dtype if "lut" in tensors else torch.float32), name)
    table = tensors["lut"]
    if not bool(torch.isfinite(table).all()):
        raise CheckpointError(
            "the look-up table holds NaN or infinity", f"{name}.lut", "The file is damaged: quantize or copy it again"
        )
    if not bool((table[:, 1:] >= table[:, :-1]).all()):
        raise CheckpointError(
            "the look-up table is not ascending", f"{name}.lut", "The file is damaged: quantize or copy it again"
        )
    check_padding(tensors["weight"], shape[1], scheme.bits, f"{name}.weight")


def unpack(
    tensors: dict[str, Tensor], scheme: Scheme, shape: tuple[int, int], name: str = "layer"
) -> tuple[Tensor, NonuniformGrid]:
    """The layer's tensors -> (codes uint8 [rows, cols], grid); checked first."""
    check(tensors, scheme, shape, name)
    return unpack_bits(tensors["weight"], scheme.bits, shape[1]), NonuniformGrid(levels=tensors["lut"].float())


def dense(tensors: dict[str, Tensor], scheme: Scheme, shape: tuple[int, int], name: str = "layer") -> Tensor:
    """lut[i, code[i, j]], [rows, cols], in the table's dtype."""
    codes, grid = unpack(tensors, scheme, shape, name)
    return grid.dequantize(codes).to(tensors["lut"].dtype)


def config(scheme: Scheme, layers: list[str], ignore: list[str], dtype: torch.dtype) -> dict[str, Any]:
    """``quantization_config``: the quantized layers are listed by name, so a lost one is noticed. ``ignore`` is not
    needed."""
    return {
        "quant_method": QUANT_METHOD,
        "format": "lut",
        "version": VERSION,
        "bits": scheme.bits,
        "layers": list(layers),
    }


def scheme_of(config: dict[str, Any]) -> Scheme:
    """NU<bits> of a ``quantization_config`` written by ``config``."""
    where = "config.json: quantization_config"
    if config.get("format") != "lut" or config.get("version") != VERSION:
        raise FormatError(
            f"format {config.get('format')!r} version {config.get('version')!r} is not known", where, "Upgrade leangrid"
        )
    bits, layers = config.get("bits"), config.get("layers")
    if bits not in (2, 3, 4) or isinstance(bits, bool):
        raise FormatError(
            f"bits must be 2, 3 or 4, not {bits!r}", where, "The config is damaged: quantize or copy it again"
        )
    if not isinstance(layers, list) or not layers or not all(isinstance(name, str) for name in layers):
        raise FormatError(
            "layers must list the quantized layers", where, "The config is damaged: quantize or copy it again"
        )
    return Scheme(grid="nonuniform", method="leanquant", bits=bits, group_size=None)


def covers(config: dict[str, Any], name: str) -> bool:
    """Whether ``name`` is listed."""
    return name in config["layers"]

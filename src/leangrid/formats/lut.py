"""The LUT container: codes packed at b bits and one look-up table a row. docs/formats.md specifies it.

The packed codes are called ``weight``: a reader that does not know the format asks for a float tensor [rows, cols],
finds an int32 [rows, ceil(cols b / 32)], and stops, instead of leaving the layer at random values."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from leangrid.errors import CheckpointError, FormatError
from leangrid.formats.base import CONFIG, DAMAGED_CONFIG, Format, Layout
from leangrid.formats.bit_stream import pack as pack_bits
from leangrid.formats.bit_stream import packed_width
from leangrid.formats.bit_stream import unpack as unpack_bits
from leangrid.formats.checks import DAMAGED, cast_exactly, check_layout, check_padding
from leangrid.grids import Grid, NonuniformGrid
from leangrid.schemes import Scheme

VERSION = 1


class Lut(Format):
    """w[i, j] = lut[i, code[i, j]]."""

    NAME = "lut"
    QUANT_METHOD = "leangrid"

    def refuse(self, scheme: Scheme, name: str, rows: int, cols: int, kind: str = "linear") -> str | None:
        """Affine schemes, for which a table a row would be a detour. nn.Linear and Conv1D both fit."""
        if scheme.grid != "nonuniform":
            return (
                f"{name}: format lut holds non-uniform grids, not an affine one. "
                f"Use NU{min(scheme.bits, 4)}, or format compressed-tensors"
            )
        return None

    def layout(self, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> Layout:
        """weight int32 [rows, ceil(cols b / 32)]; lut ``dtype`` [rows, 2^b]."""
        rows, cols = shape
        return {"weight": (torch.int32, (rows, packed_width(cols, scheme.bits))), "lut": (dtype, (rows, scheme.levels))}

    def pack(
        self, codes: UInt8[Tensor, "rows cols"], grid: Grid, dtype: torch.dtype, scheme: Scheme
    ) -> dict[str, Tensor]:
        """Of a non-uniform grid, levels [rows, 2^b]. FormatError for another grid, or where ``dtype`` rounds a
        level."""
        if not isinstance(grid, NonuniformGrid) or grid.levels.shape[1] != scheme.levels:
            what = (
                f"format lut holds non-uniform grids of {scheme.levels} levels here, "
                f"not {type(grid).__name__} of {grid.bits} bits"
            )
            raise FormatError(what, None, "Use format compressed-tensors for affine grids")
        tensors = {"weight": pack_bits(codes, scheme.bits), "lut": cast_exactly(grid.levels, dtype, "levels")}
        self.check(tensors, scheme, (codes.shape[0], codes.shape[1]), "the packed layer")
        return tensors

    def check(self, tensors: dict[str, Tensor], scheme: Scheme, shape: tuple[int, int], name: str) -> None:
        """Shapes and dtypes, finite and ascending tables, padding bits of 0."""
        dtype = tensors["lut"].dtype if "lut" in tensors else torch.float32
        check_layout(tensors, self.layout(scheme, shape, dtype), name)
        table = tensors["lut"]
        if not bool(torch.isfinite(table).all()):
            raise CheckpointError("the look-up table holds NaN or infinity", f"{name}.lut", DAMAGED)
        if not bool((table[:, 1:] >= table[:, :-1]).all()):
            raise CheckpointError("the look-up table is not ascending", f"{name}.lut", DAMAGED)
        check_padding(tensors["weight"], shape[1], scheme.bits, f"{name}.weight")

    def unpack(
        self, tensors: dict[str, Tensor], scheme: Scheme, shape: tuple[int, int], name: str = "layer"
    ) -> tuple[Tensor, NonuniformGrid]:
        """(codes uint8 [rows, cols], grid)."""
        self.check(tensors, scheme, shape, name)
        return unpack_bits(tensors["weight"], scheme.bits, shape[1]), NonuniformGrid(levels=tensors["lut"].float())

    def weight_dtype(self, tensors: dict[str, Tensor]) -> torch.dtype:
        """The table's."""
        return tensors["lut"].dtype

    def config(self, schemes: Mapping[str, Scheme], ignore: list[str]) -> dict[str, Any]:
        """The quantized layers are listed by name, so that a lost one is noticed; ``ignore`` is not needed."""
        return {
            "quant_method": self.QUANT_METHOD,
            "format": self.NAME,
            "version": VERSION,
            "bits": self.only_scheme(schemes).bits,
            "layers": list(schemes),
        }

    def is_config(self, config: dict[str, Any]) -> bool:
        """``format`` tells leangrid's own containers apart."""
        return super().is_config(config) and config.get("format") == self.NAME

    def scheme_of(self, config: dict[str, Any]) -> Scheme:
        """NU<bits>."""
        if config.get("format") != self.NAME or config.get("version") != VERSION:
            what = f"format {config.get('format')!r} version {config.get('version')!r} is not known"
            raise FormatError(what, CONFIG, "Upgrade leangrid")
        bits, layers = config.get("bits"), config.get("layers")
        if bits not in (2, 3, 4) or isinstance(bits, bool):
            raise FormatError(f"bits must be 2, 3 or 4, not {bits!r}", CONFIG, DAMAGED_CONFIG)
        if not isinstance(layers, list) or not layers or not all(isinstance(name, str) for name in layers):
            raise FormatError("layers must list the quantized layers", CONFIG, DAMAGED_CONFIG)
        return Scheme(grid="nonuniform", method="leanquant", bits=bits, group_size=None)

    def covers(self, config: dict[str, Any], name: str) -> bool:
        """Whether ``name`` is listed."""
        return name in (config.get("layers") or ())

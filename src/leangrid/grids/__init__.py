"""Grids: the values that quantized weights may take, learned before the sweep."""

from leangrid.grids.affine import AffineGrid, fit_affine
from leangrid.grids.base import Grid, GroupedGrid, Precision
from leangrid.grids.k_types import SuperblockGrid, fit_superblock, minmax_superblock
from leangrid.grids.minmax import fit_minmax
from leangrid.grids.nonuniform import NonuniformGrid, fit_nonuniform
from leangrid.grids.offset import OffsetGrid, fit_offset, minmax_offset

GRIDS: dict[str, type[Grid]] = {"affine": AffineGrid, "nonuniform": NonuniformGrid, "offset": OffsetGrid,
                                "superblock": SuperblockGrid}  # fmt: skip

__all__ = [
    "GRIDS",
    "AffineGrid",
    "Grid",
    "GroupedGrid",
    "NonuniformGrid",
    "OffsetGrid",
    "Precision",
    "SuperblockGrid",
    "fit_affine",
    "fit_minmax",
    "fit_nonuniform",
    "fit_offset",
    "fit_superblock",
    "minmax_offset",
    "minmax_superblock",
]

"""Grids: the values that quantized weights may take, fitted before codes are chosen.

    grid = leangrid.grids.fit_affine(weight, loss_error_weights, bits=4)          # equal steps: scale and zero point
    grid = leangrid.grids.fit_nonuniform(weight, loss_error_weights, levels=16)   # free levels
    codes = grid.nearest(weight)
    weight_hat = grid.dequantize(codes)

To add a kind of grid, write one file with a subclass of ``Grid`` (or ``GroupedGrid``), and add its rows to
``KINDS`` and to ``schemes.GRID_SCHEMES``."""

from leangrid.grids.affine import AffineGrid, fit_affine, fit_minmax
from leangrid.grids.base import Grid, GroupedGrid, Precision
from leangrid.grids.k_types import KTypeGrid, fit_k_type, fit_minmax_k_type
from leangrid.grids.nonuniform import NonuniformGrid, fit_nonuniform
from leangrid.grids.offset import OffsetGrid, fit_minmax_offset, fit_offset
from leangrid.schemes import Scheme

# The value of ``Scheme.grid`` -> the class that fits, refines and plans it.
KINDS: dict[str, type[Grid]] = {
    "affine": AffineGrid,
    "nonuniform": NonuniformGrid,
    "offset": OffsetGrid,
    "superblock": KTypeGrid,
}

__all__ = [
    "KINDS",
    "AffineGrid",
    "Grid",
    "GroupedGrid",
    "KTypeGrid",
    "NonuniformGrid",
    "OffsetGrid",
    "Precision",
    "fit_affine",
    "fit_k_type",
    "fit_minmax",
    "fit_minmax_k_type",
    "fit_minmax_offset",
    "fit_nonuniform",
    "fit_offset",
    "grid_class",
]


def grid_class(scheme: Scheme) -> type[Grid]:
    """The class of a scheme's grid: its row of ``KINDS``."""
    return KINDS[scheme.grid]

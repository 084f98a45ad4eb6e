"""Grids: the values that quantized weights may take, fitted before codes are chosen.

    grid = leangrid.grids.fit_affine(weight, loss_error_weights, bits=4)          # equal steps: scale and zero point
    grid = leangrid.grids.fit_nonuniform(weight, loss_error_weights, levels=16)   # free levels
    codes = grid.nearest(weight)
    weight_hat = grid.dequantize(codes)

To add a kind of grid, write one file with a subclass of ``Grid`` (or ``GroupedGrid``), and add its row to ``KINDS``."""

from leangrid.errors import RecipeError
from leangrid.grids.affine import AffineGrid, fit_affine, fit_minmax
from leangrid.grids.base import Grid, GroupedGrid, Precision
from leangrid.grids.k_types import SuperblockGrid, fit_minmax_superblock, fit_superblock
from leangrid.grids.nonuniform import NonuniformGrid, fit_nonuniform
from leangrid.grids.offset import OffsetGrid, fit_minmax_offset, fit_offset
from leangrid.recipe import Scheme

# The value of ``Scheme.grid`` -> the class that fits, refines and plans it.
KINDS: dict[str, type[Grid]] = {
    "affine": AffineGrid,
    "nonuniform": NonuniformGrid,
    "offset": OffsetGrid,
    "superblock": SuperblockGrid,
}

__all__ = [
    "KINDS",
    "AffineGrid",
    "Grid",
    "GroupedGrid",
    "NonuniformGrid",
    "OffsetGrid",
    "Precision",
    "SuperblockGrid",
    "fit_affine",
    "fit_minmax",
    "fit_minmax_offset",
    "fit_minmax_superblock",
    "fit_nonuniform",
    "fit_offset",
    "fit_superblock",
    "kind_of",
]


def kind_of(scheme: Scheme) -> type[Grid]:
    """The row of ``KINDS`` for a scheme; RecipeError where its grid has none."""
    if scheme.grid not in KINDS:
        raise RecipeError(f"'{scheme.grid}' is no kind of grid", "scheme", f"Kinds: {', '.join(KINDS)}")
    return KINDS[scheme.grid]

"""LeanQuant-Exact (Algorithm 2): in every row, always quantize the remaining column that costs least, then remove it.

Each row has its own order and so its own inverse Hessian of what remains: n^3/6 multiplications a row, for layers as
wide as BERT's."""

from jaxtyping import Float
from torch import Tensor

from leangrid import kernels
from leangrid.grids import Grid, GroupedGrid
from leangrid.solve.factor import Factor
from leangrid.solve.sweep import Swept


def exact_sweep(weight: Float[Tensor, "rows cols"], factor: Factor, grid: Grid) -> Swept:
    """Quantize ``weight`` onto ``grid`` by optimal brain quantization, row by row its own order, in float64."""
    weight, inverse = weight.float(), factor.inverse()
    if isinstance(grid, GroupedGrid):
        group = grid.group_of(weight.shape[1])
        codes, loss = kernels.exact_affine(weight, inverse, grid.scale.float(), grid.zero, group, grid.bits)
    else:
        codes, loss = kernels.exact_levels(weight, inverse, grid.levels)
    return Swept(codes, loss)

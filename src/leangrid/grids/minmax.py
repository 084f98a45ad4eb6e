"""Min-max affine grids: the range of a row or group, stretched to hold 0, cut in 2^b - 1 steps. The baseline, and
nothing else."""

import torch
from jaxtyping import Float
from torch import Tensor

from leangrid.grids.affine import AffineGrid, round_scale
from leangrid.grids.base import check_weight, group_columns


def fit_minmax(
    weight: Float[Tensor, "rows cols"],
    bits: int,
    group_size: int | None = None,
    symmetric: bool = False,
    scale_dtype: torch.dtype | None = None,
) -> AffineGrid:
    """S = (hi - lo) / (2^b - 1), Z = rint(-lo / S), lo = min(w, 0), hi = max(w, 0); symmetric: S = 2 max|w| / (2^b -
    1), Z = 2^(b-1).

    Groups of zeros get S = 1. Raises ShapeError as fit_affine does.
    """
    weight = check_weight(weight)
    grouped = weight.reshape(weight.shape[0], -1, group_columns(weight.shape[1], group_size))
    lo, hi = (extreme.double() for extreme in grouped.aminmax(dim=2))
    lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    if symmetric:
        hi = torch.maximum(hi, -lo)
        lo = -hi
    span = hi - lo  # float64: the range of two float32 extremes may overflow float32
    scale = (span / (2**bits - 1)).float()
    scale = round_scale(torch.where(scale > 0, scale, torch.ones_like(scale)), scale_dtype)
    if symmetric:
        zero_point = torch.full_like(scale, 2 ** (bits - 1))
    else:
        zero_point = (-lo / scale).round().clamp(0, 2**bits - 1)
    return AffineGrid(scale, zero_point.to(torch.uint8), bits, group_size)

"""Every kernel in plain torch: the meaning of each op, and the path for CUDA tensors and for machines without the
extension."""

from leangrid.kernels.plain.affine import affine_search
from leangrid.kernels.plain.exact import exact_affine, exact_levels
from leangrid.kernels.plain.kmeans import kmeans_dp, kmeans_lloyd
from leangrid.kernels.plain.sweep import (
    descend_affine,
    descend_levels,
    descend_offset,
    level_gram,
    sweep_affine,
    sweep_levels,
    sweep_offset,
)

__all__ = [
    "affine_search",
    "descend_affine",
    "descend_levels",
    "descend_offset",
    "exact_affine",
    "exact_levels",
    "kmeans_dp",
    "kmeans_lloyd",
    "level_gram",
    "sweep_affine",
    "sweep_levels",
    "sweep_offset",
]

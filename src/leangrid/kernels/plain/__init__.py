"""Every kernel in plain torch, one op a file: what each op means, and the path of machines without the C++ extension
and of devices without Triton."""

from leangrid.kernels.plain.affine import affine_search
from leangrid.kernels.plain.descend import descend_affine, descend_levels, descend_offset
from leangrid.kernels.plain.exact import exact_affine, exact_levels
from leangrid.kernels.plain.kmeans import kmeans_dp, kmeans_lloyd
from leangrid.kernels.plain.level_gram import level_gram
from leangrid.kernels.plain.sweep import sweep_affine, sweep_levels, sweep_offset

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

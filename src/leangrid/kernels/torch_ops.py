"""Every kernel in plain torch: the meaning of each op, and the path for CUDA tensors and for machines without the extension."""

from leangrid.kernels.torch_affine import affine_search
from leangrid.kernels.torch_exact import exact_affine, exact_levels
from leangrid.kernels.torch_kmeans import kmeans_dp, kmeans_lloyd
from leangrid.kernels.torch_sweep import (
    descend_affine,
    descend_levels,
    descend_offset,
    level_gram,
    sweep_affine,
    sweep_levels,
    sweep_offset,
)

__all__ = ["affine_search", "descend_affine", "descend_levels", "descend_offset", "exact_affine", "exact_levels", "kmeans_dp",
           "kmeans_lloyd", "level_gram", "sweep_affine", "sweep_levels", "sweep_offset"]  # fmt: skip

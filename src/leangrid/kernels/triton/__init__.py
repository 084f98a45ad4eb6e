"""The ops as Triton kernels for GPUs, one op a file. LeanQuant-Exact has none and runs in plain torch: it is meant for
small layers."""

from leangrid.kernels.plain.exact import exact_affine as exact_affine
from leangrid.kernels.plain.exact import exact_levels as exact_levels
from leangrid.kernels.triton.affine import affine_search as affine_search
from leangrid.kernels.triton.affine_linear import affine_linear as affine_linear
from leangrid.kernels.triton.descend import descend_affine as descend_affine
from leangrid.kernels.triton.descend import descend_levels as descend_levels
from leangrid.kernels.triton.descend import descend_offset as descend_offset
from leangrid.kernels.triton.kmeans import kmeans_dp as kmeans_dp
from leangrid.kernels.triton.kmeans import kmeans_lloyd as kmeans_lloyd
from leangrid.kernels.triton.level_gram import level_gram as level_gram
from leangrid.kernels.triton.lut_linear import lut_linear as lut_linear
from leangrid.kernels.triton.sweep import sweep_affine as sweep_affine
from leangrid.kernels.triton.sweep import sweep_levels as sweep_levels
from leangrid.kernels.triton.sweep import sweep_offset as sweep_offset

"""Kernels in Triton, one op a file; the meaning of each is its torch twin."""

from leangrid.kernels.triton.affine_linear import affine_linear
from leangrid.kernels.triton.descend import descend_affine, descend_levels
from leangrid.kernels.triton.level_gram import level_gram
from leangrid.kernels.triton.lut_linear import lut_linear
from leangrid.kernels.triton.sweep import sweep_affine, sweep_levels

__all__ = ["affine_linear", "descend_affine", "descend_levels", "level_gram", "lut_linear", "sweep_affine", "sweep_levels"]

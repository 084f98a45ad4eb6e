"""Kernels in Triton, one op a file; the meaning of each is its torch twin."""

from leangrid.kernels.triton.descend import descend_affine, descend_levels
from leangrid.kernels.triton.sweep import sweep_affine, sweep_levels

__all__ = ["descend_affine", "descend_levels", "sweep_affine", "sweep_levels"]

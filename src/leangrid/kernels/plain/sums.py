"""Sums of outer products over tokens in plain torch: only the upper block triangle of x^T x is multiplied."""

import torch
from torch import Tensor

PANEL = 512  # columns a GEMM: wide enough for full speed, narrow enough to skip most of the lower triangle


def outer_sums(x: Tensor, matrix: Tensor, original: Tensor | None, cross: Tensor | None) -> None:
    """See ``leangrid.kernels.outer_sums``."""
    x, cols = x.to(torch.float32), x.shape[1]
    for start in range(0, cols, PANEL):
        stop = min(start + PANEL, cols)
        matrix[start:stop, start:].addmm_(x[:, start:stop].T, x[:, start:])
    if original is not None and cross is not None:
        cross.addmm_(original.to(torch.float32).T, x)

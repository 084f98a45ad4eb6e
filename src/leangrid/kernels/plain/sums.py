"""Sums of outer products over tokens in plain torch: the twin of cpu/tiles.cpp. Only the blocks of x^T x on and above
the diagonal are computed."""

import torch
from torch import Tensor

PANEL = 512  # columns of a product: wide enough for full speed, narrow enough to skip most of the lower triangle


def outer_sums(x: Tensor, matrix: Tensor, original: Tensor | None, cross: Tensor | None) -> None:
    """See ``leangrid.kernels.outer_sums``."""
    x, cols = x.to(torch.float32), x.shape[1]
    # H += x^T x, the upper block triangle.
    for start in range(0, cols, PANEL):
        stop = min(start + PANEL, cols)
        matrix[start:stop, start:].addmm_(x[:, start:stop].T, x[:, start:])
    # G += original^T x, all of it.
    if original is not None and cross is not None:
        cross.addmm_(original.to(torch.float32).T, x)

"""The normal equations of each row's levels in plain torch: the twin of cpu/gram.h and triton/level_gram.py."""

import torch
from jaxtyping import Float32, Float64, Int64, UInt8
from torch import Tensor

CHUNK_ELEMENTS = 1 << 25  # entries of one-hot matrices that are held at once


def level_gram(
    hessian: Float32[Tensor, "n n"], codes: UInt8[Tensor, "rows n"], levels: int
) -> Float64[Tensor, "rows k k"]:
    """See ``leangrid.kernels.level_gram``; here as K dense products a row, some rows at a time."""
    rows, n = codes.shape
    out = torch.zeros(rows, levels, levels, dtype=torch.float64, device=hessian.device)
    step = max(1, CHUNK_ELEMENTS // max(1, n * levels))
    for r in range(0, rows, step):
        part: Int64[Tensor, "r n"] = codes[r : r + step].long()
        # P^T of these rows, [r, K, n]: one where the row's code is k.
        onehot = torch.zeros(len(part), levels, n, device=hessian.device).scatter_(1, part[:, None, :], 1.0)
        # P^T H in float32, then times P in float64.
        product = (onehot.reshape(-1, n) @ hessian).view(len(part), levels, n).double()
        out[r : r + step] = product @ onehot.double().transpose(1, 2)
    return out

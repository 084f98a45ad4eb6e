"""What the fast code is compared with: the algorithms as the papers write them, in float64, short and slow."""

from itertools import combinations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from leangrid.solve.sweep import Swept


def _levels_of(levels: Tensor, cols: int) -> Tensor:
    """Levels [rows, K] or [rows, groups, K] as float64 [rows, cols, K], groups in column order."""
    grouped = levels.double() if levels.ndim == 3 else levels.double()[:, None]
    return grouped.repeat_interleave(cols // grouped.shape[1], dim=1)


def reference_sweep(
    weight: Float[Tensor, "rows cols"],
    damped: Float[Tensor, "cols cols"],
    levels: Float[Tensor, "rows ..."],
    order: Int[Tensor, " cols"],
) -> Swept:
    """Algorithm 1 column by column: nearest level (the first of equals), compensate, eliminate the column from H^-1.

    Args:
        damped: H + lambda I, original column order.
        levels: grid.levels, [rows, K] or [rows, groups, K].
        order: columns in elimination order.
    """
    w, inverse = weight.double().clone(), torch.linalg.inv(damped.double())
    values = _levels_of(levels, w.shape[1])
    codes, loss = torch.zeros(w.shape, dtype=torch.uint8), torch.zeros(w.shape[0], dtype=torch.float64)
    for j in order.tolist():
        codes[:, j] = (values[:, j] - w[:, j, None]).abs().argmin(1)
        error = w[:, j] - values[:, j].gather(1, codes[:, j, None].long())[:, 0]
        loss += error.square() / (2 * inverse[j, j])
        w -= torch.outer(error / inverse[j, j], inverse[j])
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return Swept(codes, loss)


def reference_obq(
    weight: Float[Tensor, "rows cols"], damped: Float[Tensor, "cols cols"], levels: Float[Tensor, "rows ..."]
) -> Swept:
    """Algorithm 2 with an explicit inverse of the remaining submatrix at every step of every row."""
    w, hessian = weight.double().clone(), damped.double()
    values = _levels_of(levels, w.shape[1])
    codes, loss = torch.zeros(w.shape, dtype=torch.uint8), torch.zeros(w.shape[0], dtype=torch.float64)
    for r in range(w.shape[0]):
        left = list(range(w.shape[1]))
        while left:
            inverse = torch.linalg.inv(hessian[left][:, left])
            nearest = (values[r, left] - w[r, left, None]).abs().argmin(1)
            error = w[r, left] - values[r, left].gather(1, nearest[:, None])[:, 0]
            pick = int((error.square() / (2 * inverse.diagonal())).argmin())
            codes[r, left[pick]] = nearest[pick]
            loss[r] += error[pick] ** 2 / (2 * inverse[pick, pick])
            w[r, left] -= error[pick] / inverse[pick, pick] * inverse[:, pick]
            del left[pick]
    return Swept(codes, loss)


def reference_affine(
    weight: Float[Tensor, " cols"], loss_error_weights: Float[Tensor, " cols"], bits: int, steps: int, shrink: float
) -> tuple[float, int, float]:
    """S, Z and objective of the best of all t^2 candidates of one group, every weight quantized for each (t = shrink *
    steps)."""
    w, g, top = weight.double(), loss_error_weights.double(), 2**bits - 1
    lo, hi = min(float(w.min()), 0.0), max(float(w.max()), 0.0)
    best = (1.0, 0, float("inf"))
    for a in range(round(shrink * steps)):
        for c in range(round(shrink * steps)):
            low, high = lo + a * (hi - lo) / steps, hi - c * (hi - lo) / steps
            scale = float(torch.tensor((high - low) / top, dtype=torch.float32))
            zero_point = min(max(round(-low / scale), 0), top)
            value = scale * ((w / scale + zero_point).round().clamp(0, top) - zero_point)
            objective = float((g * (value - w).square()).sum())
            if objective < best[2]:
                best = (scale, zero_point, objective)
    return best


def reference_kmeans(
    weight: Float[Tensor, " cols"], loss_error_weights: Float[Tensor, " cols"], levels: int
) -> tuple[Tensor, float]:
    """Levels and objective of the best of all partitions of the sorted row into ``levels`` intervals (empty ones
    included)."""
    w, order = weight.double().sort()
    g = loss_error_weights.double()[order]
    best, centres = float("inf"), w[:1].expand(levels)
    for cuts in combinations(range(len(w) + levels - 1), levels - 1):
        ends = [cut - i for i, cut in enumerate(cuts)]
        parts = [slice(a, b) for a, b in zip([0, *ends], [*ends, len(w)], strict=True) if b > a]
        means = [float((g[p] * w[p]).sum() / g[p].sum()) if g[p].sum() > 0 else float(w[p].mean()) for p in parts]
        objective = sum(float((g[p] * (w[p] - m).square()).sum()) for p, m in zip(parts, means, strict=True))
        if objective < best:
            best, centres = objective, torch.tensor([*means, *means[-1:] * (levels - len(means))], dtype=torch.float64)
    return centres, best


def reference_share(
    weight: Float[Tensor, "rows cols"],
    original: Float[Tensor, "tokens cols"],
    quantized: Float[Tensor, "tokens cols"],
    first: Bool[Tensor, " tokens"],
    damping: float,
) -> float:
    """The share of the correction by halves, in whole matrices, from the mean G - H of each half's n and m tokens: the
    noise of their mean over all N has the variance of the difference of the two, times n m / N^2.

    Args:
        first: which tokens are in the first half.
        damping: lambda / mean(diag H).
    """
    w, x, y = weight.double(), original.double(), quantized.double()
    halves = [(x[part] - y[part]).T @ y[part] * 2 / int(part.sum()) for part in (first, ~first)]
    part = float(first.double().mean())
    whole = part * halves[0] + (1 - part) * halves[1]
    hessian = 2 / len(y) * y.T @ y
    inverse = torch.linalg.inv(hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian)))
    signal, noise = (float(((w @ d) @ inverse * (w @ d)).sum()) for d in (whole, halves[0] - halves[1]))
    return min(0.5, max(0.0, 1 - part * (1 - part) * noise / signal))

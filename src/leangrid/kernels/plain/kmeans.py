"""Weighted one-dimensional k-means of each row in plain torch: the twin of cpu/kmeans.h, cpu/kmeans_path.h and
triton/kmeans.py, and the meaning of all three.

The clusters of a sorted row are intervals. With prefix sums of g, g x and g x^2 the cost of any interval,
sum g (x - mean)^2 = s2 - s1^2 / s0, takes O(1). The sums start in the middle of the row and x is measured from its
middle element, so that an outlier at either end does not cancel against the other weights. Every operation is
elementwise or a sequential float64 sum, in the same order as in C++, so both give the same bits except where two optima
tie."""

from collections.abc import Callable

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

CHUNK_ELEMENTS = 1 << 20  # weights handled at once: bounds the temporaries of a layer to some hundred MB
START_BINS = 128


class SortedRows:
    """Rows of weights sorted ascending, with prefix sums from their middle.

    Attributes:
        value, share: the weights and their importances g in that order, f64 [rows, n].
        centre: the middle weight, f64 [rows, 1]; x = value - centre.
        p0, p1, p2: prefix sums of g, g x, g x^2, f64 [rows, n + 1]; entry n // 2 is 0.
    """

    def __init__(self, weight: Tensor, importance: Tensor) -> None:
        value, order = torch.sort(weight + 0.0, dim=1, stable=True)  # + 0.0 turns -0.0 into 0.0
        self.value = value.double()
        self.share = torch.gather(importance.expand_as(weight), 1, order)
        middle = weight.shape[1] // 2
        self.centre = self.value[:, middle : middle + 1].clone()
        x = self.value - self.centre
        first = self.share * x
        self.p0, self.p1, self.p2 = (_anchored(term, middle) for term in (self.share, first, first * x))


def _anchored(term: Float64[Tensor, "rows n"], middle: int) -> Float64[Tensor, "rows n+1"]:
    rows, n = term.shape
    out = term.new_zeros(rows, n + 1)
    out[:, middle + 1 :] = term[:, middle:].cumsum(1)
    out[:, :middle] = -term[:, :middle].flip(1).cumsum(1).flip(1)
    return out


def centroids(
    rows: SortedRows, bounds: Int64[Tensor, "rows edges"]
) -> tuple[Float64[Tensor, "rows k"], Float64[Tensor, "rows k"]]:
    """The weighted mean of each interval [bounds[k], bounds[k + 1]), NaN where it is empty, and its sum of g."""
    n = rows.value.shape[1]
    left, right = bounds[:, :-1], bounds[:, 1:]
    mass = rows.p0.gather(1, right) - rows.p0.gather(1, left)
    low, high = rows.value.gather(1, left.clamp(max=n - 1)), rows.value.gather(1, (right - 1).clamp(min=0))
    mean = (rows.p1.gather(1, right) - rows.p1.gather(1, left)) / mass + rows.centre
    mean = torch.where(mass > 0, torch.minimum(torch.maximum(mean, low), high), 0.5 * (low + high))
    return torch.where(right > left, mean, torch.nan), mass


def _cost(rows: SortedRows, bounds: Int64[Tensor, "rows edges"]) -> Float64[Tensor, "rows k"]:
    """sum g (x - mean)^2 of each interval."""
    left, right = bounds[:, :-1], bounds[:, 1:]
    s0, s1, s2 = (p.gather(1, right) - p.gather(1, left) for p in (rows.p0, rows.p1, rows.p2))
    return (s2 - torch.where(s0 > 0, s1 * s1 / s0, 0.0)).clamp(min=0.0)


def fill_empty(levels: Float64[Tensor, "rows k"]) -> Float64[Tensor, "rows k"]:
    """Levels of empty intervals (NaN) replaced by the level before them, or at the start by the one after them."""
    levels = levels.clone()
    count = levels.shape[1]
    for k in range(1, count):
        levels[:, k] = torch.where(levels[:, k].isnan(), levels[:, k - 1], levels[:, k])
    for k in range(count - 2, -1, -1):
        levels[:, k] = torch.where(levels[:, k].isnan(), levels[:, k + 1], levels[:, k])
    return levels


def _ranks(rows: SortedRows, levels: Float64[Tensor, "rows k"]) -> Int64[Tensor, "rows k+1"]:
    """Where each level's interval of nearest elements starts, and n; a midpoint belongs to the lower level."""
    n = rows.value.shape[1]
    inner = torch.searchsorted(rows.value, 0.5 * (levels[:, :-1] + levels[:, 1:]), right=True)
    return torch.cat([inner.new_zeros(len(levels), 1), inner, inner.new_full((len(levels), 1), n)], dim=1)


def round_and_score(rows: SortedRows, levels: Float64[Tensor, "rows k"]) -> tuple[Tensor, Tensor]:
    """The levels rounded to float32 [rows, K], and their objective sum g (nearest level - w)^2, f64 [rows].

    A row with at most K distinct values gets exactly those, the smallest one repeated in front.
    """
    # Number the distinct values of each row.
    new = torch.cat([torch.ones_like(rows.value[:, :1], dtype=torch.bool), rows.value.diff(dim=1) > 0], dim=1)
    kind = new.cumsum(1)
    few = kind[:, -1:] <= levels.shape[1]
    slot = torch.where(few, levels.shape[1] - kind[:, -1:] + kind - 1, 0)
    distinct = rows.value[:, :1].expand_as(levels).scatter(1, slot, rows.value)
    rounded = torch.where(few, distinct, levels).float()
    exact = rounded.double()
    # The objective of the rounded levels, one weight after the other.
    bounds = _ranks(rows, exact)
    position = torch.arange(rows.value.shape[1], device=levels.device).expand_as(rows.value).contiguous()
    nearest = torch.searchsorted(bounds[:, 1:].contiguous(), position, right=True).clamp(max=levels.shape[1] - 1)
    error = rows.value - exact.gather(1, nearest)
    return rounded, (rows.share * error * error).cumsum(1)[:, -1].clone()


def _best_split(rows: SortedRows, done: Tensor, at: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The last interval of the cheapest clustering of each prefix: min over i in [low, high] of done[i] + cost(i, at).

    Args:
        done: the least cost of every prefix with one cluster fewer, f64 [rows, n + 1].
        at, low, high: ends of the prefixes and ranges of i, i64 [rows, m].

    Returns:
        the minimum, f64 [rows, m], and the smallest i that reaches it, i64 [rows, m].
    """
    # The ranges have different lengths, so all their candidates lie in one flat tensor.
    count, width = at.shape[1], done.shape[1]
    lengths = (high - low + 1).reshape(-1)
    segment = torch.repeat_interleave(lengths)
    start = lengths.cumsum(0) - lengths
    split = torch.arange(len(segment), device=at.device) - start[segment] + low.reshape(-1)[segment]
    row = torch.div(segment, count, rounding_mode="floor") * width
    here, there = row + split, row + at.reshape(-1)[segment]
    s0, s1, s2 = (p.reshape(-1)[there] - p.reshape(-1)[here] for p in (rows.p0, rows.p1, rows.p2))
    value = done.reshape(-1)[here] + (s2 - torch.where(s0 > 0, s1 * s1 / s0, 0.0)).clamp(min=0.0)
    best = torch.segment_reduce(value, "min", lengths=lengths, unsafe=True)
    candidate = torch.where(value == best[segment], split.double(), float(width))
    return best.view_as(at), torch.segment_reduce(candidate, "min", lengths=lengths, unsafe=True).long().view_as(at)


def _layer(rows: SortedRows, done: Tensor) -> tuple[Tensor, Tensor]:
    """One step of the dynamic program: the least cost of every prefix with one cluster more, and where its last cluster
    starts.

    The best start never falls as the prefix grows, so prefixes are solved at halving strides: the starts found at the
    coarser stride bound those between them."""
    size = done.shape[1]  # n + 1 prefixes, at positions 1..size below
    best = torch.empty_like(done)
    split = torch.zeros(len(done), size + 1, dtype=torch.int64, device=done.device)
    stride = 1 << (size.bit_length() - 1)
    while stride:
        position = torch.arange(stride, size + 1, 2 * stride, device=done.device)
        at = (position - 1).expand(len(done), -1)
        low = split[:, position - stride]
        bounded = position + stride <= size
        high = torch.where(bounded, split[:, (position + stride).clamp(max=size)], size - 1).minimum(at)
        best[:, position - 1], split[:, position] = _best_split(rows, done, at, low, high)
        stride //= 2
    return best, split[:, 1:]


def _dp(rows: SortedRows, levels: int) -> tuple[Tensor, Tensor]:
    count, n = rows.value.shape
    # One cluster: the cost of every prefix.
    ends = torch.arange(n + 1, device=rows.value.device)
    s0, s1, s2 = (p - p[:, :1] for p in (rows.p0, rows.p1, rows.p2))
    done = (s2 - torch.where(s0 > 0, s1 * s1 / s0, 0.0)).clamp(min=0.0)
    # Two to K - 1 clusters for every prefix; the K-th is needed for the whole row alone.
    splits: list[Tensor] = []
    for _ in range(levels - 2):
        done, split = _layer(rows, done)
        splits.append(split)
    bounds = [ends[-1:].expand(count, 1)]
    if levels > 1:
        zero = torch.zeros_like(bounds[0])
        bounds.append(_best_split(rows, done, bounds[0], zero, bounds[0])[1])
    # Back from the end of the row: where each cluster starts.
    for split in reversed(splits):
        bounds.append(split.gather(1, bounds[-1]))
    bounds.append(torch.zeros_like(bounds[0]))
    return round_and_score(rows, fill_empty(centroids(rows, torch.cat(bounds[::-1], dim=1))[0]))


def initial_levels(rows: SortedRows, levels: int) -> Float64[Tensor, "rows k"]:
    """Where Lloyd's iteration starts.

    Uniform between the smallest and largest weight for K <= 8 (as LeanQuant's authors do); else quantiles of
    mass^(1/3) width^(2/3), the optimal density of many levels (Panter and Dite 1951), over START_BINS bins of equal
    count. The cube root is computed as a product of square roots, which are the same bits on every processor."""
    n = rows.value.shape[1]
    low, high = rows.value[:, :1], rows.value[:, -1:]
    rank = torch.arange(levels, dtype=torch.float64, device=low.device)
    if levels <= 8:
        return low + (high - low) * rank / max(1, levels - 1)
    bins = min(n, START_BINS)
    knots = torch.arange(bins + 1, device=low.device) * n // bins
    mass, edge = rows.p0[:, knots].diff(dim=1), rows.value[:, knots.clamp(max=n - 1)]
    width = edge.diff(dim=1)
    power = (mass * width) * width
    density = torch.ones_like(power)
    for _ in range(4):
        power = power.sqrt().sqrt()
        density = density * power
    upto = density.cumsum(1)
    target = upto[:, -1:] * ((rank + 0.5) / levels)
    spot = torch.searchsorted(upto, target).clamp(max=bins - 1)
    inside = (target - (upto - density).gather(1, spot)) / density.gather(1, spot)
    inside = torch.where(inside > 0, inside.clamp(max=1.0), 0.0)
    return edge.gather(1, spot) + inside * width.gather(1, spot)


def _relocate(rows: SortedRows, bounds: Tensor, levels: Tensor, mass: Tensor) -> Tensor:
    """The first level whose interval has no importance moved to the far end of the costliest interval, as scikit-learn
    relocates empty clusters; levels sorted again."""
    cost = _cost(rows, bounds)
    worst, which = cost.max(1, keepdim=True)
    empty = (mass <= 0).to(torch.uint8).argmax(1, keepdim=True)
    move = (worst > 0) & (mass <= 0).any(1, keepdim=True)
    n = rows.value.shape[1]
    low = rows.value.gather(1, bounds.gather(1, which).clamp(max=n - 1))
    high = rows.value.gather(1, (bounds.gather(1, which + 1) - 1).clamp(min=0))
    centre = levels.gather(1, which)
    far = torch.where(centre - low > high - centre, low, high)
    return levels.scatter(1, empty, torch.where(move, far, levels.gather(1, empty))).sort(1).values


def _lloyd(rows: SortedRows, levels: int, iterations: int) -> tuple[Tensor, Tensor]:
    current = initial_levels(rows, levels)
    bounds = torch.full((len(current), levels + 1), -1, dtype=torch.int64, device=current.device)
    for _ in range(iterations):
        # Assign: the interval of weights nearest to each level. Nothing changed: done.
        new = _ranks(rows, current)
        if torch.equal(new, bounds):
            break
        bounds = new
        # Update: each level becomes the weighted mean of its interval.
        mean, mass = centroids(rows, bounds)
        current = torch.where(mass > 0, mean, current)
        current = _relocate(rows, bounds, current, mass)
    return round_and_score(rows, current)


def solve_in_chunks(
    weight: Tensor,
    importance: Tensor,
    levels: int,
    solve: Callable[[SortedRows], tuple[Tensor, Tensor]],
    elements: int = CHUNK_ELEMENTS,
) -> tuple[Tensor, Tensor]:
    """Run ``solve`` on some rows at a time, up to ``elements`` weights or one row.

    Returns:
        levels f32 [rows, K] and objectives f64 [rows].
    """
    rows, n = weight.shape
    out = torch.empty(rows, levels, device=weight.device)
    objective = torch.empty(rows, dtype=torch.float64, device=weight.device)
    step = max(1, elements // max(1, n))
    for r in range(0, rows, step):
        part = slice(r, min(rows, r + step))
        out[part], objective[part] = solve(
            SortedRows(weight[part], importance if importance.ndim == 1 else importance[part])
        )
    return out, objective


def kmeans_dp(weight: Tensor, importance: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """The globally optimal levels; see ``leangrid.kernels.kmeans_dp``."""
    return solve_in_chunks(weight, importance, levels, lambda rows: _dp(rows, levels))


def kmeans_lloyd(weight: Tensor, importance: Tensor, levels: int, iterations: int) -> tuple[Tensor, Tensor]:
    """Lloyd's iteration from a deterministic start; see ``leangrid.kernels.kmeans_lloyd``."""
    return solve_in_chunks(weight, importance, levels, lambda rows: _lloyd(rows, levels, iterations))

"""Weighted k-means on a GPU, the twin of plain/kmeans.py: torch sorts and sums, one program a row runs the dynamic
program or Lloyd's iteration.

Sorting, prefix sums and the final rounding are the functions of plain/kmeans.py. The dynamic program is one kernel: a
layer finds the best splits of all prefixes at halving strides, so that the splits already found bound the range of each
new one, about n candidates a stride in all. The first strides have few prefixes with long ranges, the last ones many
with short ranges: the tile is 4 x 128, 32 x 16 or 256 x 2 prefixes by candidates. Lloyd bisects both ends of every
level's interval at once and decides on the GPU when to stop. Arithmetic is float64, one division a candidate."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from leangrid.kernels.plain.kmeans import (
    SortedRows,
    centroids,
    fill_empty,
    initial_levels,
    round_and_score,
    solve_in_chunks,
)
from leangrid.kernels.triton.device import launch

CHUNK_ELEMENTS = 1 << 22  # weights handled at once: sums, costs and temporaries take some 120 bytes each
CHUNK_SPLITS = 1 << 28  # splits that are stored for backtracking at once, 4 bytes each: K - 2 a weight
WIDE, COARSE, FINE = 512, 5, 9  # candidates of a tile; the strides at which its shape changes


@triton.jit
@no_type_check
def _part(s0, s1, s2):
    """The cost of an interval, s2 - s1^2 / s0, from its sums of g, g x, g x^2."""
    return tl.maximum(s2 - tl.where(s0 > 0.0, s1 * s1, 0.0) / tl.where(s0 > 0.0, s0, 1.0), 0.0)


@triton.jit
@no_type_check
def _strides(p0, p1, p2, done, best, split, before, n, top, begin, end, FIRST: tl.constexpr, PREFIXES: tl.constexpr,
             CANDIDATES: tl.constexpr):  # fmt: skip
    """Strides number begin..end-1 of a layer, whose prefixes lie top >> number apart.

    best [n + 1] gets the least cost of every such prefix, split [n + 1] where its last cluster starts. ``before`` are
    the splits with one cluster fewer: the last cluster never starts earlier than there.
    """
    for level in range(begin, end):
        stride = top >> level
        count = (n + 1 + stride) // (2 * stride)
        for group in range(0, count, PREFIXES):
            m = group + tl.arange(0, PREFIXES)
            live = m < count
            at = stride + 2 * stride * m - 1
            low = tl.load(split + at - stride, mask=live & (m > 0), other=0)
            if not FIRST:
                low = tl.maximum(low, tl.load(before + at, mask=live, other=0))
            high = tl.minimum(tl.load(split + at + stride, mask=live & (at + stride <= n), other=n), at)
            low = tl.where(live, tl.minimum(low, high), high + 1)
            e0, e1 = tl.load(p0 + at, mask=live, other=0.0), tl.load(p1 + at, mask=live, other=0.0)
            e2 = tl.load(p2 + at, mask=live, other=0.0)
            least = tl.full([PREFIXES, CANDIDATES], float("inf"), tl.float64)
            which = tl.zeros([PREFIXES, CANDIDATES], tl.int32) + n
            for offset in range(0, tl.max(high - low, axis=0) + 1, CANDIDATES):
                i = (low + offset)[:, None] + tl.arange(0, CANDIDATES)[None, :]
                inside = i <= high[:, None]
                s0 = e0[:, None] - tl.load(p0 + i, mask=inside, other=0.0)
                s1 = e1[:, None] - tl.load(p1 + i, mask=inside, other=0.0)
                s2 = e2[:, None] - tl.load(p2 + i, mask=inside, other=0.0)
                here = tl.load(done + i, mask=inside, other=float("inf")) + _part(s0, s1, s2)
                which = tl.where(here < least, i, which)
                least = tl.minimum(here, least)
            value = tl.min(least, axis=1)
            tl.store(best + at, value, mask=live)
            tl.store(split + at, tl.min(tl.where(least == value[:, None], which, n), axis=1), mask=live)
        tl.debug_barrier()  # the next stride reads these splits, the next layer these costs


@triton.jit
@no_type_check
def _layer(p0, p1, p2, done, best, split, before, n, top, strides, FIRST: tl.constexpr, WIDE: tl.constexpr,
           COARSE: tl.constexpr, FINE: tl.constexpr):  # fmt: skip
    """One step of the dynamic program, from the least costs ``done`` to those with one cluster more."""
    coarse, fine = tl.minimum(strides, COARSE), tl.minimum(strides, FINE)
    _strides(p0, p1, p2, done, best, split, before, n, top, 0, coarse, FIRST, 4, WIDE // 4)
    _strides(p0, p1, p2, done, best, split, before, n, top, coarse, fine, FIRST, 32, WIDE // 32)
    _strides(p0, p1, p2, done, best, split, before, n, top, fine, strides, FIRST, 256, WIDE // 256)


@triton.jit(do_not_specialize=["n", "top", "strides", "layers"])
@no_type_check
def _dp(
    p0,
    p1,
    p2,
    costs,
    splits,
    bounds,
    n,
    top,
    strides,
    layers,
    WIDE: tl.constexpr,
    COARSE: tl.constexpr,
    FINE: tl.constexpr,
):
    """The dynamic program of one row. Workspace: costs f64 [rows, 2, n + 1], splits i32 [rows, layers, n + 1]. Result:
    bounds i32 [rows, layers + 3], where each cluster starts, and n."""
    row, size = tl.program_id(0).to(tl.int64), n + 1
    p0, p1, p2, costs = p0 + row * size, p1 + row * size, p2 + row * size, costs + row * 2 * size
    splits, bounds = splits + row * layers * size, bounds + row * (layers + 3)
    f0, f1, f2 = tl.load(p0), tl.load(p1), tl.load(p2)
    for begin in range(0, size, WIDE):
        i = begin + tl.arange(0, WIDE)
        inside = i < size
        s0, s1 = tl.load(p0 + i, mask=inside, other=0.0) - f0, tl.load(p1 + i, mask=inside, other=0.0) - f1
        tl.store(costs + i, _part(s0, s1, tl.load(p2 + i, mask=inside, other=0.0) - f2), mask=inside)
    tl.debug_barrier()
    if layers > 0:
        _layer(p0, p1, p2, costs, costs + size, splits, splits, n, top, strides, True, WIDE, COARSE, FINE)
    for layer in range(1, layers):
        done, best, split = costs + (layer % 2) * size, costs + ((layer + 1) % 2) * size, splits + layer * size
        _layer(p0, p1, p2, done, best, split, split - size, n, top, strides, False, WIDE, COARSE, FINE)
    done = costs + (layers % 2) * size
    e0, e1, e2 = tl.load(p0 + n), tl.load(p1 + n), tl.load(p2 + n)
    least, which = tl.full([WIDE], float("inf"), tl.float64), tl.zeros([WIDE], tl.int32)
    for begin in range(0, size, WIDE):
        i = begin + tl.arange(0, WIDE)
        inside = i < size
        s0, s1 = e0 - tl.load(p0 + i, mask=inside, other=0.0), e1 - tl.load(p1 + i, mask=inside, other=0.0)
        part = _part(s0, s1, e2 - tl.load(p2 + i, mask=inside, other=0.0))
        here = tl.load(done + i, mask=inside, other=float("inf")) + part
        which = tl.where(here < least, i, which)
        least = tl.minimum(here, least)
    at = tl.min(tl.where(least == tl.min(least, axis=0), which, n), axis=0)
    tl.store(bounds, 0)
    tl.store(bounds + layers + 2, n)
    tl.store(bounds + layers + 1, at)
    for back in range(0, layers):
        at = tl.load(splits + (layers - 1 - back) * size + at)
        tl.store(bounds + layers - back, at)


@triton.jit
@no_type_check
def _rank(value, x, n, top, halvings):
    """How many of the sorted values are at most x."""
    rank = tl.zeros_like(x).to(tl.int32)
    for turn in range(0, halvings):
        i = rank + (top >> turn) - 1
        rank = tl.where(tl.load(value + i, mask=i < n, other=float("inf")) <= x, i + 1, rank)
    return rank


@triton.jit(do_not_specialize=["n", "top", "halvings", "levels", "iterations"])
@no_type_check
def _lloyd(value, p0, p1, p2, current, out, n, top, halvings, levels, iterations, K: tl.constexpr):
    """Lloyd's iteration of one row. current f64 [rows, 2, levels] has the initial levels in its first half and
    alternates between the two; out f64 [rows, levels]."""
    row, size = tl.program_id(0).to(tl.int64), n + 1
    value, p0, p1, p2 = value + row * n, p0 + row * size, p1 + row * size, p2 + row * size
    current, out = current + row * 2 * levels, out + row * levels
    k = tl.arange(0, K)
    used = k < levels
    centre = tl.load(value + n // 2)
    left, right = tl.zeros([K], tl.int32) - 1, tl.zeros([K], tl.int32) - 1
    turn, moved = 0, 1
    while (turn < iterations) & (moved > 0):
        here, there = current + (turn % 2) * levels, current + ((turn + 1) % 2) * levels
        level = tl.load(here + k, mask=used, other=0.0)
        lower = tl.load(here + k - 1, mask=used & (k > 0), other=0.0)
        upper = tl.load(here + k + 1, mask=k + 1 < levels, other=0.0)
        begin = tl.where(k > 0, _rank(value, 0.5 * (lower + level), n, top, halvings), 0)
        end = tl.where(k + 1 < levels, _rank(value, 0.5 * (level + upper), n, top, halvings), n)
        begin, end = tl.where(used, begin, n), tl.where(used, end, n)
        moved = tl.max(((begin != left) | (end != right)).to(tl.int32), axis=0)
        left, right = begin, end
        s0, s1 = tl.load(p0 + right) - tl.load(p0 + left), tl.load(p1 + right) - tl.load(p1 + left)
        cost = tl.where(used, _part(s0, s1, tl.load(p2 + right) - tl.load(p2 + left)), -1.0)
        low, high = tl.load(value + tl.minimum(left, n - 1)), tl.load(value + tl.maximum(right - 1, 0))
        mean = tl.minimum(tl.maximum(s1 / tl.where(s0 > 0.0, s0, 1.0) + centre, low), high)
        level = tl.where(moved > 0, tl.where(s0 > 0.0, mean, level), level)
        # The first level without importance moves to the far end of the costliest interval, and to its place in the
        # order.
        empty = tl.min(tl.where(used & (s0 <= 0.0), k, K), axis=0)
        worst = tl.max(cost, axis=0)
        source = k == tl.min(tl.where(cost == worst, k, K), axis=0)
        empty = tl.where(worst > 0.0, tl.where(moved > 0, empty, K), K)
        far = tl.sum(tl.where(source, tl.where(level - low > high - level, low, high), 0.0), axis=0)
        other = used & (k != empty)
        after = k - (k > empty).to(tl.int32) + (level >= far).to(tl.int32)
        place = tl.where(k == empty, tl.sum((other & (level < far)).to(tl.int32), axis=0), after)
        tl.store(there + tl.where(empty < K, place, k), tl.where(k == empty, far, level), mask=used)
        tl.debug_barrier()  # neighbours read each other's levels
        turn += 1
    tl.store(out + k, tl.load(current + (turn % 2) * levels + k, mask=used, other=0.0), mask=used)


def kmeans_dp(weight: Tensor, importance: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """The globally optimal levels; see ``leangrid.kernels.kmeans_dp``."""

    def solve(rows: SortedRows) -> tuple[Tensor, Tensor]:
        count, n = rows.value.shape
        bounds = torch.zeros(count, levels + 1, dtype=torch.int32, device=weight.device)
        if levels == 1:
            bounds[:, 1] = n
        else:
            costs = torch.empty(count, 2, n + 1, dtype=torch.float64, device=weight.device)
            splits = torch.empty(count, levels - 2, n + 1, dtype=torch.int32, device=weight.device)
            strides = (n + 1).bit_length()
            launch(
                _dp,
                count,
                rows.p0,
                rows.p1,
                rows.p2,
                costs,
                splits,
                bounds,
                n,
                1 << (strides - 1),
                strides,
                levels - 2,
                WIDE=WIDE,
                COARSE=COARSE,
                FINE=FINE,
                num_warps=4,
                num_stages=1,
            )
        return round_and_score(rows, fill_empty(centroids(rows, bounds.long())[0]))

    return solve_in_chunks(weight, importance, levels, solve, min(CHUNK_ELEMENTS, CHUNK_SPLITS // levels))


def kmeans_lloyd(weight: Tensor, importance: Tensor, levels: int, iterations: int) -> tuple[Tensor, Tensor]:
    """Lloyd's iteration from a deterministic start; see ``leangrid.kernels.kmeans_lloyd``."""

    def solve(rows: SortedRows) -> tuple[Tensor, Tensor]:
        count, n = rows.value.shape
        current = torch.empty(count, 2, levels, dtype=torch.float64, device=weight.device)
        current[:, 0] = initial_levels(rows, levels)
        out = torch.empty(count, levels, dtype=torch.float64, device=weight.device)
        launch(
            _lloyd,
            count,
            rows.value,
            rows.p0,
            rows.p1,
            rows.p2,
            current,
            out,
            n,
            1 << (n.bit_length() - 1),
            n.bit_length(),
            levels,
            iterations,
            K=triton.next_power_of_2(levels),
            num_warps=1,
            num_stages=1,
        )
        return round_and_score(rows, out)

    return solve_in_chunks(weight, importance, levels, solve, CHUNK_ELEMENTS)

"""The affine search on a GPU, the twin of plain/affine.py, whose docstring has the mathematics: one program scores
every distinct (S, Z) of a row or group on chip.

torch sorts each group once. ``_tails`` sums g|w| and g in float64 from every weight outwards, on its own side of zero.
``_search`` then reads no weight: the thresholds of an S cut the sorted group at K-1 places on either side of zero,
found by bisection in L1, and a cumulative sum over those places scores all Z of that S. At 4 bits and T = 2048 these
are 25,000 bisections of 13 steps for 4096 weights; quantizing them for the about 2,400 distinct pairs would be ten
million roundings, for all 168,100 candidates 700 million. For groups of 128 sums and roundings cost about the same, but
float32 roundings would need a second, exact comparison. Float64 is used for thresholds and sums only, about 300
operations an S, so that GPUs with little of it lose little."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from leangrid.kernels.checks import FLOATS
from leangrid.kernels.plain.affine import SCALE_LIMITS, shrink_steps
from leangrid.kernels.triton.device import launch

CHUNK_ELEMENTS = 1 << 23  # weights handled at once: sorted copies and sums take about 40 bytes each
SCAN = 512  # weights that a program reads at once where it runs along a row


@triton.jit(do_not_specialize=["first", "period", "items"])
@no_type_check
def _tails(value, order, share, tails, energy, first, period, items, n, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Fill tails [items, n + 2, 2]: entry i + 1 is (sum g|w|, sum g) over sorted element i and all that lie farther
    from 0 on its side; the first and last entry are 0. ``energy`` [items] is sum g w^2."""
    item = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = item < items
    row, out = (item * n)[:, None], tails + (item * (2 * n + 4))[:, None]
    source = (((first + item) % period) * n)[:, None]
    zero = tl.zeros([ROWS], tl.float64)
    tl.store(tails + item * (2 * n + 4), zero, mask=live)
    tl.store(tails + item * (2 * n + 4) + 1, zero, mask=live)
    tl.store(tails + item * (2 * n + 4) + 2 * n + 2, zero, mask=live)
    tl.store(tails + item * (2 * n + 4) + 2 * n + 3, zero, mask=live)
    total, left1, left0, right1, right0 = zero, zero, zero, zero, zero
    for begin in range(0, n, BLOCK):
        i = (begin + tl.arange(0, BLOCK))[None, :]
        inside = live[:, None] & (i < n)
        x = tl.load(value + row + i, mask=inside, other=0.0).to(tl.float64)
        g = tl.load(share + source + tl.load(order + row + i, mask=inside, other=0), mask=inside, other=0.0)
        total += tl.sum((g * x) * x, axis=1)
        g = tl.where(x < 0.0, g, 0.0)
        term = g * -x
        tl.store(out + 2 * i + 2, left1[:, None] + tl.cumsum(term, axis=1), mask=inside & (x < 0.0))
        tl.store(out + 2 * i + 3, left0[:, None] + tl.cumsum(g, axis=1), mask=inside & (x < 0.0))
        left1 += tl.sum(term, axis=1)
        left0 += tl.sum(g, axis=1)
    tl.store(energy + item, total, mask=live)
    blocks = (n + BLOCK - 1) // BLOCK
    for back in range(0, blocks):
        i = ((blocks - 1 - back) * BLOCK + tl.arange(0, BLOCK))[None, :]
        inside = live[:, None] & (i < n)
        x = tl.load(value + row + i, mask=inside, other=0.0).to(tl.float64)
        g = tl.load(share + source + tl.load(order + row + i, mask=inside, other=0), mask=inside, other=0.0)
        g = tl.where(x > 0.0, g, 0.0)
        term = g * x
        tl.store(out + 2 * i + 2, right1[:, None] + tl.cumsum(term, axis=1, reverse=True), mask=inside & (x > 0.0))
        tl.store(out + 2 * i + 3, right0[:, None] + tl.cumsum(g, axis=1, reverse=True), mask=inside & (x > 0.0))
        right1 += tl.sum(term, axis=1)
        right0 += tl.sum(g, axis=1)


@triton.jit
@no_type_check
def _rint(x):
    """Half to even, for |x| < 2^51: adding 1.5 * 2^52 leaves no bit for a fraction."""
    return (x + 6755399441055744.0) - 6755399441055744.0


@triton.jit
@no_type_check
def _stored(x, smallest, largest, DTYPE: tl.constexpr):
    """x >= 0 rounded to float32, then to the dtype of the scale, as float64 inside its limits. Rounded with integer
    operations, so the same on every GPU."""
    single = x.to(tl.float32)
    bits = single.to(tl.int32, bitcast=True)
    if DTYPE == 2:
        single = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    if DTYPE == 1:
        small = (_rint(single.to(tl.float64) * 16777216.0) / 16777216.0).to(tl.float32)
        normal = ((bits + 0xFFF + ((bits >> 13) & 1)) & -8192).to(tl.float32, bitcast=True)
        single = tl.where(single < 6.103515625e-05, small, normal)
    return tl.minimum(tl.maximum(single.to(tl.float64), smallest), largest)


@triton.jit
@no_type_check
def _zero_point(a, lo, width, scale, steps, LEVELS: tl.constexpr):
    low = lo + a * width / steps
    return _rint(tl.minimum(tl.maximum(-low / scale, 0.0), LEVELS - 1.0))


@triton.jit
@no_type_check
def _candidates(z, s, lo, width, scale, steps, t, LEVELS: tl.constexpr):
    """Which z [LEVELS, 1] are the zero point of some candidate a of the scales s [BLOCK]."""
    fewest, most = tl.maximum(s - (t - 1), 0).to(tl.float64), tl.minimum(s, t - 1).to(tl.float64)
    first = _zero_point(most, lo, width, scale, steps, LEVELS)
    last = _zero_point(fewest, lo, width, scale, steps, LEVELS)
    zed = z.to(tl.float64)
    valid = (zed >= first[None, :]) & (zed <= last[None, :])
    gaps = width / steps / scale >= 0.99  # one step of a may move -lo/S by more than 1 and skip a z: go through every a
    if tl.max(gaps.to(tl.int32), axis=0) > 0:
        hit = valid & (zed < 0.0)
        for step in range(0, t):
            a = tl.minimum(tl.maximum(fewest, step), most)
            hit = hit | (zed == _zero_point(a, lo, width, scale, steps, LEVELS)[None, :])
        valid = tl.where(gaps[None, :], hit, valid)
    return valid


@triton.jit
@no_type_check
def _below(x):
    """The largest float32 that is not above the positive float64 x: the same float32 weights are greater than
    either."""
    single = x.to(tl.float32)
    bits = single.to(tl.int32, bitcast=True) - (single.to(tl.float64) > x).to(tl.int32)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
@no_type_check
def _values(row, tail, total, z, scale, n, top, halvings, LEVELS: tl.constexpr, BLOCK: tl.constexpr):
    """The objective total - 2 S A + S^2 B of every (z, scale): f64 [LEVELS, BLOCK].

    The bisection works on the tile laid flat, where neighbouring threads have neighbouring scales, whose places share
    cache lines. In two dimensions Triton 3.6 gives neighbouring threads neighbouring z, whose places in the row lie far
    apart, and computes the scales once for every z."""
    # v, the steps from zero on either side; 0 has no threshold.
    up, down = LEVELS - 1.0 - z.to(tl.float64), z.to(tl.float64)
    above = _below(tl.where(up > 0.0, scale[None, :] * (up - 0.5), float("inf")))
    under = -_below(tl.where(down > 0.0, scale[None, :] * (down - 0.5), float("inf")))
    above, under = tl.reshape(above, [LEVELS * BLOCK]), tl.reshape(under, [LEVELS * BLOCK])
    right, left = tl.zeros([LEVELS * BLOCK], tl.int32), tl.zeros([LEVELS * BLOCK], tl.int32)
    for turn in range(0, halvings):
        step = top >> turn
        i, j = right + (step - 1), left + (step - 1)
        x = tl.load(row + i, mask=i < n, other=float("inf"))
        y = tl.load(row + j, mask=j < n, other=float("inf"))
        right = tl.where(x <= above, right + step, right)
        left = tl.where(y < under, left + step, left)
    right = tl.minimum(right, n) + 1  # an infinite threshold also counts what the masks filled in
    right1, right0 = tl.load(tail + 2 * right), tl.load(tail + 2 * right + 1)
    left1, left0 = tl.load(tail + 2 * left), tl.load(tail + 2 * left + 1)
    a = tl.cumsum(tl.reshape(right1, [LEVELS, BLOCK]), axis=0, reverse=True) + tl.cumsum(
        tl.reshape(left1, [LEVELS, BLOCK]), axis=0
    )
    b = tl.cumsum(tl.reshape(right0, [LEVELS, BLOCK]) * (2.0 * up - 1.0), axis=0, reverse=True)
    b += tl.cumsum(tl.reshape(left0, [LEVELS, BLOCK]) * (2.0 * down - 1.0), axis=0)
    big = scale[None, :]
    return (total - (2.0 * big) * a) + (big * big) * b


@triton.jit(do_not_specialize=["first", "period", "steps", "t", "top", "halvings"])
@no_type_check
def _search(value, tails, energy, weight, share, scale_out, zero_out, objective_out, first, period, n, steps, t, top,
            halvings, smallest, largest, LEVELS: tl.constexpr, BLOCK: tl.constexpr, SCAN: tl.constexpr,
            SYMMETRIC: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """The first best (S, Z) of one item, in order of s, then of Z (symmetric: K/2, then K/2 - 1, which stands for a
    negative S), and its objective."""
    item = tl.program_id(0).to(tl.int64)
    row, tail, total = value + item * n, tails + item * (2 * n + 4), tl.load(energy + item)
    lo = tl.minimum(tl.load(row).to(tl.float64), 0.0)
    hi = tl.maximum(tl.load(row + n - 1).to(tl.float64), 0.0)
    if SYMMETRIC:
        hi = tl.maximum(-lo, hi)
        lo = -hi
    width = hi - lo
    z = tl.arange(0, LEVELS)[:, None]
    best, scale_of = tl.full([BLOCK], float("inf"), tl.float64), tl.full([BLOCK], 1.0, tl.float64)
    at = tl.full([BLOCK], -1, tl.int64)
    for begin in range(0, 2 * t - 1, BLOCK):
        s = begin + tl.arange(0, BLOCK)
        scale = _stored((width - s.to(tl.float64) * width / steps) / (LEVELS - 1.0), smallest, largest, DTYPE)
        if SYMMETRIC:
            valid = (z == LEVELS // 2) | (z == LEVELS // 2 - 1)
            rank = LEVELS // 2 - z
        else:
            valid = _candidates(z, s, lo, width, scale, steps, t, LEVELS)
            rank = z
        objective = _values(row, tail, total, z, scale, n, top, halvings, LEVELS, BLOCK)
        objective = tl.where(valid & (s < 2 * t - 1)[None, :], objective, float("inf"))
        least = tl.min(objective, axis=0)
        which = tl.min(tl.where(objective == least[None, :], rank, LEVELS), axis=0)
        better = least < best
        best = tl.where(better, least, best)
        scale_of = tl.where(better, scale, scale_of)
        at = tl.where(better, s.to(tl.int64) * LEVELS + which, at)
    key = tl.min(tl.where(best == tl.min(best, axis=0), at, 0x7FFFFFFFFFFFFFFF), axis=0)
    scale = tl.max(tl.where(at == key, scale_of, 0.0), axis=0)
    zero_point = (key % LEVELS).to(tl.int32)
    if SYMMETRIC:
        scale = tl.where(zero_point == 0, scale, -scale)
        zero_point = tl.full((), LEVELS // 2, tl.int32)
    scale = tl.where(width > 0.0, scale, 1.0)
    zero_point = tl.where((width > 0.0) | SYMMETRIC, zero_point, 0)
    tl.store(scale_out + item, scale.to(tl.float32))
    tl.store(zero_out + item, zero_point.to(tl.uint8))
    tl.store(
        objective_out + item,
        _literal(weight + item * n, share + ((first + item) % period) * n, scale, zero_point, n, LEVELS, SCAN),
    )


@triton.jit
@no_type_check
def _literal(weight, share, scale, zero_point, n, LEVELS: tl.constexpr, SCAN: tl.constexpr):
    """The objective sum g (quant(w) - w)^2 of one (S, Z), every weight quantized."""
    zed = zero_point.to(tl.float64)
    total = tl.zeros([SCAN], tl.float64)
    for begin in range(0, n, SCAN):
        i = begin + tl.arange(0, SCAN)
        x = tl.load(weight + i, mask=i < n, other=0.0).to(tl.float64)
        g = tl.load(share + i, mask=i < n, other=0.0)
        code = _rint(tl.minimum(tl.maximum(x / scale + zed, 0.0), LEVELS - 1.0))
        error = x - scale * (code - zed)
        total += g * error * error
    return tl.sum(total, axis=0)


def affine_search(weight: Tensor, importance: Tensor, bits: int, steps: int, shrink: float, group_size: int,
                  symmetric: bool, scale_dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The best pair (S, Z) of each row and group; see ``leangrid.kernels.affine_search``."""
    rows, cols = weight.shape
    groups, n, levels, dtype = cols // group_size, group_size, 2**bits, scale_dtype or torch.float32
    items = weight.reshape(rows * groups, n)
    period = groups if importance.ndim == 1 else max(1, rows * groups)
    scale = torch.empty(rows * groups, device=weight.device)
    zero_point = torch.empty(rows * groups, dtype=torch.uint8, device=weight.device)
    objective = torch.empty(rows * groups, dtype=torch.float64, device=weight.device)
    scan = min(SCAN, triton.next_power_of_2(n))
    chunk = max(1, CHUNK_ELEMENTS // n)
    for r in range(0, len(items), chunk):
        part = items[r : r + chunk]
        count = len(part)
        value, order = part.sort(dim=1, stable=True)
        tails = torch.empty(count, n + 2, 2, dtype=torch.float64, device=weight.device)
        energy = torch.empty(count, dtype=torch.float64, device=weight.device)
        launch(_tails, triton.cdiv(count, SCAN // scan), value, order, importance, tails, energy, r, period, count, n,
               ROWS=SCAN // scan, BLOCK=scan, num_warps=4)  # fmt: skip
        launch(
            _search,
            count,
            value,
            tails,
            energy,
            part,
            importance,
            scale[r:],
            zero_point[r:],
            objective[r:],
            r,
            period,
            n,
            steps,
            shrink_steps(steps, shrink),
            1 << (n.bit_length() - 1),
            n.bit_length(),
            *SCALE_LIMITS[dtype],
            LEVELS=levels,
            BLOCK=scales_at_once(levels),
            SCAN=scan,
            SYMMETRIC=symmetric,
            DTYPE=FLOATS[dtype],
            num_warps=4 if levels <= 16 else 8,
        )
    return scale.view(rows, groups), zero_point.view(rows, groups), objective.view(rows, groups)


def scales_at_once(levels: int) -> int:
    """How many scales a tile with ``levels`` zero points has: as many as registers can hold float64 sums for."""
    return min(256, 2048 // levels) if levels <= 16 else max(4, 1024 // levels)

"""The enumerative affine search (LeanQuant, section 3) in plain torch: the twin of cpu/affine.h, cpu/affine_screen.h
and triton/affine.py, and the meaning of all three.

Candidates are lo = lo0 + a R/T, hi = hi0 - c R/T for a, c < t. S = (hi - lo)/(K-1) depends on s = a + c alone, and Z is
an integer, so only the distinct pairs (S, Z) are scored. The objective of a pair, sum g (quant(w) - w)^2, is

    sum g w^2 - 2 S A + S^2 B,
    A = sum_{v=1}^{K-1-Z} T1+(S(v-.5)) + sum_{v=1}^{Z} T1-(S(v-.5)),
    B = sum_{v=1}^{K-1-Z} (2v-1) T0+(S(v-.5)) + sum_{v=1}^{Z} (2v-1) T0-(S(v-.5)),

where T1+(x) and T0+(x) are the sums of g|w| and of g over the weights above x, T1- and T0- the same over the magnitudes
of the negative weights: a weight above S(v-.5) is at least v steps from zero. One running sum over v on either side of
zero thus serves every Z of an S; all terms have one sign, and no weight is quantized to score a pair."""

import torch
from jaxtyping import Bool, Float32, Float64, Int64
from torch import Tensor

CHUNK_CANDIDATES = 1 << 21  # candidate pairs that are scored at once
# The smallest and largest magnitude of a stored scale. float16 keeps its subnormals: without them 6e-5 would be the
# smallest.
SCALE_LIMITS = {torch.float32: (2.0**-126, 3.4028234663852886e38), torch.bfloat16: (2.0**-126, 3.3895313892515355e38),
                torch.float16: (2.0**-24, 65504.0)}  # fmt: skip


def shrink_steps(steps: int, shrink: float) -> int:
    """t, the number of values that a and c each take: shrink * T rounded, at least 1."""
    return max(1, round(shrink * steps))


def _tails(weight: Float32[Tensor, "items n"], importance: Float64[Tensor, "items n"]) -> tuple[Tensor, Tensor, Tensor]:
    """The weights above zero, for -weight those below, ready for look-ups of T1 and T0.

    Returns:
        magnitudes f64 [items, n], ascending, where weights of the other sign are 0; the sums of g|w| and of g from each
        position to the end, f64 [items, n + 1].
    """
    value, order = torch.sort(weight.clamp(min=0.0) + 0.0, dim=1, stable=True)
    value, share = value.double(), importance.gather(1, order)
    share = torch.where(value > 0, share, 0.0)
    zero = share.new_zeros(len(share), 1)
    tail1, tail0 = (torch.cat([zero, term.flip(1).cumsum(1)], dim=1).flip(1) for term in (share * value, share))
    return value, tail1, tail0


def _running(
    side: tuple[Tensor, Tensor, Tensor], scale: Float64[Tensor, "items s"], most: int
) -> tuple[Tensor, Tensor]:
    """The sums of T1(S(v-.5)) and (2v-1) T0(S(v-.5)) over 1..v, for v = 0..most: f64 [items, s, most + 1] each."""
    value, tail1, tail0 = side
    items, count = scale.shape
    v = torch.arange(1, most + 1, dtype=torch.float64, device=scale.device)
    # How many magnitudes are at most S(v-.5): T1 and T0 are the sums from there on.
    spot = torch.searchsorted(value, (scale[:, :, None] * (v - 0.5)).reshape(items, -1), right=True)
    out = []
    for tail, factor in ((tail1, torch.ones_like(v)), (tail0, 2.0 * v - 1.0)):
        term = tail.gather(1, spot).view(items, count, most) * factor
        out.append(torch.cat([term.new_zeros(items, count, 1), term.cumsum(2)], dim=2))
    return out[0], out[1]


def _zero_points(
    lo: Float64[Tensor, "items"],
    width: Float64[Tensor, "items"],
    scale: Float64[Tensor, "items s"],
    levels: int,
    steps: int,
    t: int,
) -> tuple[Int64[Tensor, "items s d"], Bool[Tensor, "items s d"]]:
    """The zero points that the candidates a = 0..t-1 of each scale have, and which of the entries are meant."""

    def zero_point(a: Tensor) -> Tensor:
        low = lo[:, None] + a * width[:, None] / steps
        return torch.round(-low / scale).clamp(0, levels - 1)

    # For S number s the candidates are a = max(0, s - (t-1)) .. min(s, t-1), with c = s - a.
    s = torch.arange(scale.shape[1], dtype=torch.float64, device=scale.device)
    fewest, most = (s - (t - 1)).clamp(min=0), s.clamp(max=t - 1)
    if bool((width[:, None] / steps / scale < 0.99).all()):  # one step of a moves -lo/S by less than 1: Z skips nothing
        first, last = zero_point(most), zero_point(fewest)
        count = int((last - first).max()) + 1
        z = first[:, :, None] + torch.arange(count, device=scale.device)
        return z.clamp(max=levels - 1).long(), z <= last[:, :, None]
    every = torch.arange(levels, device=scale.device)
    valid = torch.zeros(*scale.shape, levels, dtype=torch.bool, device=scale.device)
    for a in range(t):
        step = torch.full_like(s, float(a))
        valid |= (zero_point(step)[:, :, None] == every) & ((step >= fewest) & (step <= most))[None, :, None]
    return every.expand(*scale.shape, levels), valid


def _search(weight: Tensor, importance: Tensor, levels: int, steps: int, t: int, symmetric: bool,
            dtype: torch.dtype) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The best S, f64 [items], and Z, i64 [items], of groups of weights [items, n]."""
    # The range of the weights and 0; symmetric around 0 where Z is fixed.
    lo, hi = weight.amin(1).double().clamp(max=0.0), weight.amax(1).double().clamp(min=0.0)
    if symmetric:
        hi = torch.maximum(-lo, hi)
        lo = -hi
    width = hi - lo
    # Candidate scales S = (R - s R/T) / (K-1), rounded as they will be stored.
    s = torch.arange(2 * t - 1, dtype=torch.float64, device=weight.device)
    smallest, largest = SCALE_LIMITS[dtype]
    scale = (
        ((width[:, None] - s * width[:, None] / steps) / (levels - 1))
        .float()
        .to(dtype)
        .double()
        .clamp(smallest, largest)
    )
    if symmetric:  # a negative S with Z = K/2 has the levels of a positive one with Z = K/2 - 1
        z = torch.tensor([levels // 2, levels // 2 - 1], device=weight.device).expand(*scale.shape, 2)
        valid = torch.ones_like(z, dtype=torch.bool)
    else:
        z, valid = _zero_points(lo, width, scale, levels, steps, t)
    # A and B of every pair. Sums only up to the zero points in use: 8 bits would otherwise need 255 a side.
    used = z[valid] if valid.any() else z
    above, below = levels - 1 - int(used.min()), int(used.max())
    right, left = (
        _running(_tails(weight, importance), scale, above),
        _running(_tails(-weight, importance), scale, below),
    )
    up, down = (levels - 1 - z).clamp(0, above), z.clamp(0, below)
    a, b = (r.gather(2, up) + m.gather(2, down) for r, m in zip(right, left, strict=True))
    # The objective of every pair; the first best one wins.
    x = weight.double()
    energy = ((importance * x) * x).cumsum(1)[:, -1]
    big = scale[:, :, None]
    value = (energy[:, None, None] - (2.0 * big) * a) + (big * big) * b
    value = torch.where(valid, value, torch.inf).reshape(len(weight), -1)
    best = value.argmin(1, keepdim=True)
    chosen_z = z.reshape(len(weight), -1).gather(1, best)[:, 0]
    chosen = scale.gather(1, torch.div(best, z.shape[2], rounding_mode="floor"))[:, 0]
    if symmetric:
        chosen = torch.where(chosen_z == levels // 2, chosen, -chosen)
        chosen_z = torch.full_like(chosen_z, levels // 2)
    empty = width <= 0  # all weights are 0
    return torch.where(empty, 1.0, chosen), torch.where(empty, levels // 2 if symmetric else 0, chosen_z)


def _objective(weight: Tensor, importance: Tensor, scale: Tensor, zero_point: Tensor, levels: int) -> Tensor:
    """sum g (quant(w) - w)^2 of the chosen pair, f64 [items]: every weight quantized, summed in column order."""
    x, s, z = weight.double(), scale[:, None], zero_point[:, None].double()
    code = torch.round((x / s + z).clamp(0, levels - 1))
    error = x - s * (code - z)
    return (importance * error * error).cumsum(1)[:, -1]


def affine_search(weight: Tensor, importance: Tensor, bits: int, steps: int, shrink: float, group_size: int,
                  symmetric: bool, scale_dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The best pair (S, Z) of each row and group; see ``leangrid.kernels.affine_search``."""
    rows, cols = weight.shape
    groups, t, levels = cols // group_size, shrink_steps(steps, shrink), 2**bits
    share = (importance if importance.ndim == 2 else importance.expand(rows, -1)).reshape(rows * groups, group_size)
    items = weight.reshape(rows * groups, group_size)
    scale = torch.empty(rows * groups, device=weight.device)
    zero_point = torch.empty(rows * groups, dtype=torch.uint8, device=weight.device)
    objective = torch.empty(rows * groups, dtype=torch.float64, device=weight.device)
    chunk = max(1, CHUNK_CANDIDATES // ((2 * t - 1) * levels))
    for r in range(0, len(items), chunk):
        part = slice(r, r + chunk)
        best, z = _search(items[part], share[part], levels, steps, t, symmetric, scale_dtype or torch.float32)
        scale[part], zero_point[part] = best.float(), z.to(torch.uint8)
        objective[part] = _objective(items[part], share[part], best, z, levels)
    return scale.view(rows, groups), zero_point.view(rows, groups), objective.view(rows, groups)

"""llama.cpp's K types as grids: 256 columns share one or two float16 numbers, each group of 16 or 32 of them has small
integers.

    with a minimum      w = (d sc) q - (dmin m)      Q2_K, Q4_K, Q5_K
    without             w = (d sc) (q - 2^(b-1))     Q3_K, Q6_K

d and dmin have 11 significant bits, sc, m and q at most 8, 6 and 6: every product is exact in float32, so whatever
order a reader computes in, there is one rounding, that of the difference.

The fit: the best real scale S and offset B of each group for the weighted squared error give codes; given the codes
that error is a quadratic in (S, B), and d, dmin and the integers are chosen to minimise its sum over the 256 columns.
The codes then follow the grid, and the choice is repeated."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from leangrid.block_types import BlockType
from leangrid.errors import ShapeError
from leangrid.grids.affine import fit_affine, same_sign
from leangrid.grids.base import Precision, check_weight, group_columns
from leangrid.grids.minmax import fit_minmax
from leangrid.grids.offset import OffsetGrid, fit_offset

_SMALLEST, _LARGEST = 2.0**-24, 65504.0  # of float16, subnormals included
_STEPS = 64
_REACH = torch.linspace(
    0.7, 1.15, 19
)  # the largest sub-scale, in units of the largest integer, that a candidate d gives


@dataclass(frozen=True, eq=False, kw_only=True)
class SuperblockGrid(OffsetGrid):
    """``d``, ``dmin`` float32 [rows, cols / 256], exact in float16; ``sub_scale``, ``sub_min`` int16 [rows, groups],
    sub_scale never 0.

    Scale and offset follow from them. Types without a minimum have dmin = 0, sub_min = 0, and the offset -2^(b-1) S.
    """

    kind: BlockType
    d: Float[Tensor, "rows blocks"]
    dmin: Float[Tensor, "rows blocks"]
    sub_scale: Int[Tensor, "rows groups"]
    sub_min: Int[Tensor, "rows groups"]
    scale: Float[Tensor, "rows groups"] = field(init=False)
    offset: Float[Tensor, "rows groups"] = field(init=False)
    bits: int = field(init=False)
    group_size: int | None = field(init=False)

    def __post_init__(self) -> None:
        for name, limits, values in (
            ("scale", self.kind.sc, self.sub_scale),
            ("minimum", self.kind.m or (0, 0), self.sub_min),
        ):
            if limits is None or (
                values.numel() and not limits[0] <= int(values.min()) <= int(values.max()) <= limits[1]
            ):
                raise ShapeError(f"a sub-{name} is outside {limits}", f"{self.kind.name} grid")
        for values in (self.d, self.dmin):
            if not torch.equal(values.half().float(), values):
                raise ShapeError("d or dmin is not exact in float16", f"{self.kind.name} grid")
        scale = self._wide(self.d) * self.sub_scale
        offset = -(self._wide(self.dmin) * self.sub_min) if self.kind.minimum else -self.kind.middle * scale
        for name, value in (
            ("scale", scale),
            ("offset", offset),
            ("bits", self.kind.bits),
            ("group_size", self.kind.group),
        ):
            object.__setattr__(self, name, value)
        super().__post_init__()

    def rounded(self, dtype: torch.dtype) -> "SuperblockGrid":
        """Itself: what is stored is float16 and integers whatever the checkpoint's dtype."""
        return self

    def clamped(self, precision: Precision) -> "SuperblockGrid":
        """Itself, likewise."""
        return self

    @property
    def free(self) -> Float[Tensor, "rows blocks kinds"]:
        return torch.stack((self.d, self.dmin) if self.kind.minimum else (self.d,), dim=2)

    def units(self, codes: UInt8[Tensor, "rows cols"]) -> Float[Tensor, "rows kinds cols"]:
        grouped = self._grouped(codes).float()
        units = [self.sub_scale[..., None] * (grouped - self.kind.middle)]
        if self.kind.minimum:
            units.append((-self.sub_min[..., None].float()).expand_as(grouped))
        return torch.stack([unit.reshape(codes.shape) for unit in units], dim=1)

    def refitted(self, free: Float[Tensor, "rows blocks kinds"], dtype: torch.dtype) -> "SuperblockGrid":
        if not self.kind.minimum:
            return replace(self, d=_half(same_sign(free[..., 0], self.d)))
        dmin = torch.where(free[..., 1].isfinite() & (free[..., 1] >= 0), free[..., 1], self.dmin)
        return replace(self, d=_half(same_sign(free[..., 0], self.d)), dmin=_half(dmin, 0.0))

    def _wide(self, values: Tensor) -> Tensor:
        """[rows, blocks] -> [rows, groups]."""
        return values.repeat_interleave(self.kind.cols // self.kind.group, dim=1)


def fit_superblock(
    weight: Float[Tensor, "rows cols"],
    loss_error_weights: Float[Tensor, " cols"] | Float[Tensor, "rows cols"],
    kind: BlockType,
    steps: int = 2048,
    rounds: int = 2,
) -> SuperblockGrid:
    """The grid of ``kind`` that lowers the weighted squared error, from the best real scales and offsets of its groups.

    Args:
        loss_error_weights: g_j > 0, float, original column order; shared by the rows or one a row.
        steps: T of the affine enumeration that begins it; above 64 it changes nothing that the rounds do not.
        rounds: how often codes, then d, dmin and integers are chosen again; a block keeps its best.

    Raises:
        ShapeError: weights that are not finite, or columns that 256 does not divide.
    """
    weight = check_weight(weight)
    group_columns(weight.shape[1], kind.cols)
    steps = min(steps, _STEPS)
    start = (
        fit_offset(weight, loss_error_weights, kind.bits, steps, kind.group)
        if kind.minimum
        else fit_affine(weight, loss_error_weights, kind.bits, steps, kind.group, symmetric=True)
    )
    share = loss_error_weights.double().expand_as(weight)
    sums = _Sums(weight, (share / share.amax(1, keepdim=True)).float(), kind)
    grid = chosen(sums.given(start.nearest(weight)), kind)
    best = sums.objective(grid)
    for _ in range(rounds):
        tried = chosen(sums.given(grid.nearest(weight)), kind)
        objective = sums.objective(tried)
        better = objective < best
        grid, best = _where(better, tried, grid), torch.where(better, objective, best)
    return grid


def minmax_superblock(weight: Float[Tensor, "rows cols"], kind: BlockType) -> SuperblockGrid:
    """Min-max scales (and minima) of each group, rounded to the type: d = max S / largest integer, sc = rint(S / d).
    The baseline."""
    grid = fit_minmax(weight, kind.bits, kind.group, symmetric=not kind.minimum)
    low = check_weight(weight).reshape(len(weight), -1, kind.group).amin(2).clamp(max=0)
    scale, minimum = _blocks(grid.scale, kind), _blocks(-low if kind.minimum else torch.zeros_like(low), kind)
    d, dmin = _half(scale.amax(2) / _top(kind.sc)), _half(minimum.amax(2) / _top(kind.m), 0.0)
    sub_min = torch.where(dmin[..., None] > 0, minimum / dmin[..., None], 0.0).round_().clamp_(0, _top(kind.m))
    return _grid(
        kind,
        d,
        dmin,
        (scale / d[..., None]).round_().clamp_(1, _top(kind.sc)),
        sub_min if kind.minimum else sub_min * 0,
    )


@dataclass(frozen=True, eq=False)
class Quadratic:
    """For each group [rows, blocks, groups a block]: the squared error given the codes, a S^2 + 2 b S B + c B^2 - 2 s S
    - 2 t B + rest.

    Types without a minimum have b = c = t = 0, and S alone.
    """

    a: Tensor
    b: Tensor
    c: Tensor
    s: Tensor
    t: Tensor

    def at(self, scale: Tensor, offset: Tensor) -> Tensor:
        """The error of each group, less ``rest``."""
        return scale * (self.a * scale + 2 * (self.b * offset - self.s)) + offset * (self.c * offset - 2 * self.t)

    def best(self) -> tuple[Tensor, Tensor]:
        """The real S and B of the least error with B <= 0; S = 0 where all codes are one."""
        determinant = self.a * self.c - self.b * self.b
        joint = torch.where(
            determinant > 1e-7 * self.a * self.c, (self.s * self.c - self.b * self.t) / determinant, 0.0
        )
        scale = torch.where(
            (joint > 0) & (self.offset(joint) < 0), joint, torch.where(self.a > 0, self.s / self.a, 0.0)
        )
        return scale, self.offset(scale)

    def scale(self, offset: Tensor) -> Tensor:
        """The best real S >= 0 beside B."""
        return torch.where(self.a > 0, (self.s - self.b * offset) / self.a, 0.0).clamp(min=0)

    def offset(self, scale: Tensor) -> Tensor:
        """The best real B <= 0 beside S."""
        return torch.where(self.c > 0, (self.t - self.b * scale) / self.c, 0.0).clamp(max=0)


class _Sums:
    """A weight and its importance, cut in groups; the quadratic given codes, and the error of a grid with its nearest
    codes."""

    def __init__(self, weight: Tensor, share: Tensor, kind: BlockType) -> None:
        self.weight, self.share, self.kind = weight, share, kind

    def given(self, codes: Tensor) -> Quadratic:
        unit = self._cut(codes.float() - self.kind.middle)
        weight, share = self._cut(self.weight), self._cut(self.share)
        shared = share * unit
        a, s = (shared * unit).sum(3), (shared * weight).sum(3)
        if not self.kind.minimum:
            return Quadratic(a, torch.zeros_like(a), torch.zeros_like(a), s, torch.zeros_like(a))
        return Quadratic(a, shared.sum(3), share.sum(3), s, (share * weight).sum(3))

    def objective(self, grid: SuperblockGrid) -> Tensor:
        """[rows, blocks]."""
        error = grid.dequantize(grid.nearest(self.weight)).sub_(self.weight).square_().mul_(self.share)
        return self._cut(error).sum((2, 3))

    def _cut(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(len(matrix), -1, self.kind.cols // self.kind.group, self.kind.group)


def chosen(error: Quadratic, kind: BlockType) -> SuperblockGrid:
    """d, dmin and the integers of the least error given the codes: d among candidates around the largest scale over the
    largest integer, with offsets still real; then dmin likewise; for each group the best sub-scale of three and its
    best sub-minimum."""
    scale, offset = error.best()
    if not kind.minimum:  # S alone: the nearest integer is the best
        d = _searched(scale.abs(), kind.sc, lambda d: error.at(_nearest(scale, d, kind) * d[..., None], offset))
        return _grid(kind, d, torch.zeros_like(d), _nearest(scale, d, kind), torch.zeros_like(scale))
    scale = scale.clamp(min=0)
    d = _searched(scale, kind.sc, lambda d: _integers(error, scale, d, None, kind)[2])
    dmin = _searched(-offset, kind.m, lambda dmin: _integers(error, scale, d, dmin, kind)[2], 0.0)
    return _grid(kind, d, dmin, *_integers(error, scale, d, dmin, kind)[:2])


def _integers(
    error: Quadratic, scale: Tensor, d: Tensor, dmin: Tensor | None, kind: BlockType
) -> tuple[Tensor, Tensor, Tensor]:
    """For each group the pair of integers of the least error, and that error: the three sub-scales next to S / d, each
    with its best sub-minimum, and the two sub-minima next to -B / dmin, each with its best sub-scale. Without ``dmin``
    offsets are real."""
    nearest, zero = _nearest(scale, d, kind), torch.zeros_like(scale)
    tried = [((nearest + step).clamp(1, _top(kind.sc)), zero) for step in (0, -1, 1)]
    if dmin is not None:
        unit = dmin[..., None]
        ratio = torch.where(unit > 0, -error.offset(scale) / unit, 0.0)
        minima = [m.clamp(0, _top(kind.m)) for m in (ratio.floor(), ratio.ceil())]
        tried = [
            (sc, torch.where(unit > 0, -error.offset(sc * d[..., None]) / unit, 0.0).round_().clamp_(0, _top(kind.m)))
            for sc, _ in tried
        ]
        tried += [(_nearest(error.scale(-m * unit), d, kind), m) for m in minima]
    sub_scale, sub_min, least = nearest, zero, torch.full_like(scale, torch.inf)
    for sc, m in tried:
        real = sc * d[..., None]
        cost = error.at(real, error.offset(real) if dmin is None else -m * dmin[..., None])
        better = cost < least
        sub_scale, sub_min, least = (
            torch.where(better, a, b) for a, b in ((sc, sub_scale), (m, sub_min), (cost, least))
        )
    return sub_scale, sub_min, least


def _nearest(scale: Tensor, d: Tensor, kind: BlockType) -> Tensor:
    """S / d as a sub-scale: an integer of the type's range that is not 0 (codes alone can say 0)."""
    low, high = kind.sc or (1, 1)
    ratio = (scale / d[..., None]).round_().clamp_(low, high)
    return torch.where(ratio == 0, torch.where(scale < 0, -1.0, 1.0), ratio).clamp_(low or 1)


def _searched(
    values: Tensor, limits: tuple[int, int] | None, cost: Callable[[Tensor], Tensor], least: float = _SMALLEST
) -> Tensor:
    """The float16 number [rows, blocks] of the least cost, a group each summed, among those near max(values) / largest
    integer."""
    most = values.amax(2)
    best = _half(most / _top(limits), least)
    found = cost(best).sum(2)
    for reach in _REACH:
        tried = _half(most / (reach * _top(limits)), least)
        value = cost(tried).sum(2)
        better = value < found
        best, found = torch.where(better, tried, best), torch.where(better, value, found)
    return best


def _half(values: Tensor, least: float = _SMALLEST) -> Tensor:
    """float32, rounded to float16, between ``least`` and the largest finite one."""
    return values.clamp(least, _LARGEST).half().float()


def _top(limits: tuple[int, int] | None) -> int:
    return limits[1] if limits else 1


def _blocks(values: Tensor, kind: BlockType) -> Tensor:
    """[rows, groups] -> [rows, blocks, groups a block]."""
    return values.reshape(len(values), -1, kind.cols // kind.group)


def _grid(kind: BlockType, d: Tensor, dmin: Tensor, sub_scale: Tensor, sub_min: Tensor) -> SuperblockGrid:
    scales, minima = (values.flatten(1).to(torch.int16) for values in (sub_scale, sub_min))
    return SuperblockGrid(kind=kind, d=d, dmin=dmin, sub_scale=scales, sub_min=minima)


def _where(better: Tensor, grid: SuperblockGrid, other: SuperblockGrid) -> SuperblockGrid:
    wide = better.repeat_interleave(grid.kind.cols // grid.kind.group, dim=1)
    pairs = {name: (better, getattr(grid, name), getattr(other, name)) for name in ("d", "dmin")}
    pairs |= {name: (wide, getattr(grid, name), getattr(other, name)) for name in ("sub_scale", "sub_min")}
    return replace(grid, **{name: torch.where(*values) for name, values in pairs.items()})

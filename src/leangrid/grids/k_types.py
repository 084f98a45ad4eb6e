"""llama.cpp's K types as grids: scales of scales, in superblocks of 256 columns.

A superblock stores one or two float16 numbers, d and dmin, and small integers sc and m for each group of 16 or 32 of
its columns:

    with a minimum      w = (d sc) q - (dmin m)      Q2_K, Q4_K, Q5_K
    without             w = (d sc) (q - 2^(b-1))     Q3_K, Q6_K

d and dmin have 11 significant bits, and sc, m and q at most 8, 6 and 6, so every product is exact in float32. Whatever
the order in which a reader computes, only the difference is rounded.

The fit begins with the best real scale S and offset B of each group for the weighted squared error, and their codes.
Given the codes, that error is a quadratic in (S, B); d, dmin and the integers are chosen to minimise its sum over the
superblock. Then the codes are chosen again on the new grid, and so on."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from leangrid.block_types import BLOCK_TYPES, BlockType
from leangrid.errors import ShapeError
from leangrid.grids.affine import fit_affine, fit_minmax, same_sign
from leangrid.grids.base import Precision, check_weight, group_columns
from leangrid.grids.offset import OffsetGrid, fit_offset
from leangrid.recipe import Recipe
from leangrid.schemes import Scheme

_SMALLEST, _LARGEST = 2.0**-24, 65504.0  # of float16, subnormals included
_ROUNDS = 2  # how often the codes, then d, dmin and the integers are chosen again; a superblock keeps its best
_STEPS = 64  # T of the affine search that begins the fit: with more, the rounds after it end at the same place
# Candidates for d: the largest S of a superblock over d, in units of the largest integer.
_LARGEST_SUB_SCALES = torch.linspace(0.7, 1.15, 19)


@dataclass(frozen=True, eq=False, kw_only=True)
class KTypeGrid(OffsetGrid):
    """The grid of a K type. ``scale`` and ``offset`` follow from what the file stores:

    Attributes:
        block_type: llama.cpp's type.
        d, dmin: float32 [rows, cols / 256], exact in float16; dmin is 0 in types without a minimum.
        sub_scale: sc, int16 [rows, groups], never 0.
        sub_min: m, int16 [rows, groups]; 0 in types without a minimum, whose offset is -2^(b-1) S.
    """

    block_type: BlockType
    d: Float[Tensor, "rows blocks"]
    dmin: Float[Tensor, "rows blocks"]
    sub_scale: Int[Tensor, "rows groups"]
    sub_min: Int[Tensor, "rows groups"]
    scale: Float[Tensor, "rows groups"] = field(init=False)
    offset: Float[Tensor, "rows groups"] = field(init=False)
    bits: int = field(init=False)
    group_size: int | None = field(init=False)

    FIT_SECONDS_PER_WEIGHT: ClassVar[float] = 3.5e-7

    def __post_init__(self) -> None:
        for name, limits, values in (
            ("scale", self.block_type.sc, self.sub_scale),
            ("minimum", self.block_type.m or (0, 0), self.sub_min),
        ):
            if limits is None or (
                values.numel() and not limits[0] <= int(values.min()) <= int(values.max()) <= limits[1]
            ):
                raise ShapeError(f"a sub-{name} is outside {limits}", f"{self.block_type.name} grid")
        for values in (self.d, self.dmin):
            if not torch.equal(values.half().float(), values):
                raise ShapeError("d or dmin is not exact in float16", f"{self.block_type.name} grid")
        scale = self._per_group(self.d) * self.sub_scale
        offset = (
            -(self._per_group(self.dmin) * self.sub_min) if self.block_type.minimum else -self.block_type.middle * scale
        )
        for name, value in (
            ("scale", scale),
            ("offset", offset),
            ("bits", self.block_type.bits),
            ("group_size", self.block_type.group),
        ):
            object.__setattr__(self, name, value)
        super().__post_init__()

    @classmethod
    def fit(
        cls, weight: Tensor, loss_error_weights: Tensor, scheme: Scheme, recipe: Recipe, precision: Precision
    ) -> "KTypeGrid":
        return fit_k_type(weight, loss_error_weights, BLOCK_TYPES[scheme.block or ""], recipe.steps)

    @classmethod
    def fit_minmax(cls, weight: Tensor, scheme: Scheme, precision: Precision) -> "KTypeGrid":
        return fit_minmax_k_type(weight, BLOCK_TYPES[scheme.block or ""])

    @classmethod
    def spans_and_kinds(cls, scheme: Scheme, cols: int) -> tuple[int, int]:
        block_type = BLOCK_TYPES[scheme.block or ""]
        return cols // group_columns(cols, block_type.cols), 2 if block_type.minimum else 1

    @classmethod
    def describe(cls, scheme: Scheme) -> str:
        return f"{scheme.block} grid (integer scales in blocks of 256)"

    def rounded(self, dtype: torch.dtype) -> "KTypeGrid":
        """This grid unchanged: it is stored in float16 and integers, whatever the dtype of the checkpoint."""
        return self

    def clamped(self, precision: Precision) -> "KTypeGrid":
        """This grid unchanged, for the same reason."""
        return self

    @property
    def parameters(self) -> Float[Tensor, "rows blocks kinds"]:
        return torch.stack((self.d, self.dmin) if self.block_type.minimum else (self.d,), dim=2)

    def design(self, codes: UInt8[Tensor, "rows cols"]) -> Float[Tensor, "rows kinds cols"]:
        grouped = self._grouped(codes).float()
        parts = [self.sub_scale[..., None] * (grouped - self.block_type.middle)]
        if self.block_type.minimum:
            parts.append((-self.sub_min[..., None].float()).expand_as(grouped))
        return torch.stack([part.reshape(codes.shape) for part in parts], dim=1)

    def with_parameters(self, parameters: Float[Tensor, "rows blocks kinds"], dtype: torch.dtype) -> "KTypeGrid":
        """As ``GroupedGrid.with_parameters``: d and dmin change, the integers stay."""
        d = _to_float16(same_sign(parameters[..., 0], self.d))
        if not self.block_type.minimum:
            return replace(self, d=d)
        dmin = parameters[..., 1]
        dmin = torch.where(dmin.isfinite() & (dmin >= 0), dmin, self.dmin)
        return replace(self, d=d, dmin=_to_float16(dmin, 0.0))

    def _per_group(self, values: Tensor) -> Tensor:
        """[rows, blocks] -> [rows, groups]."""
        return values.repeat_interleave(self.block_type.cols // self.block_type.group, dim=1)


def fit_k_type(
    weight: Float[Tensor, "rows cols"],
    loss_error_weights: Float[Tensor, " cols"] | Float[Tensor, "rows cols"],
    block_type: BlockType,
    steps: int = 2048,
) -> KTypeGrid:
    """Return a grid of ``block_type`` of low weighted squared error.

    Args:
        loss_error_weights: g, float and above 0, in original column order: [cols] for all rows, or [rows, cols].
        steps: T of the affine search that begins the fit, at most 64.

    Raises:
        ShapeError: weights that are not finite, or columns that 256 does not divide.
    """
    weight = check_weight(weight)
    group_columns(weight.shape[1], block_type.cols)
    steps = min(steps, _STEPS)
    start = (
        fit_offset(weight, loss_error_weights, block_type.bits, steps, block_type.group)
        if block_type.minimum
        else fit_affine(weight, loss_error_weights, block_type.bits, steps, block_type.group, symmetric=True)
    )
    share = loss_error_weights.double().expand_as(weight)
    sums = _GroupSums(weight, (share / share.amax(1, keepdim=True)).float(), block_type)
    grid = choose_integers(sums.quadratic(start.nearest(weight)), block_type)
    best = sums.objective(grid)
    for _ in range(_ROUNDS):
        tried = choose_integers(sums.quadratic(grid.nearest(weight)), block_type)
        objective = sums.objective(tried)
        better = objective < best
        grid, best = _select_blocks(better, tried, grid), torch.where(better, objective, best)
    return grid


def fit_minmax_k_type(weight: Float[Tensor, "rows cols"], block_type: BlockType) -> KTypeGrid:
    """Return the baselines' grid: min-max scales (and minima) of each group, rounded to what the type stores.

    d = max S / largest integer, sc = rint(S / d), and likewise dmin and m.
    """
    grid = fit_minmax(weight, block_type.bits, block_type.group, symmetric=not block_type.minimum)
    low = check_weight(weight).reshape(len(weight), -1, block_type.group).amin(2).clamp(max=0)
    scale = _blocks(grid.scale, block_type)
    minimum = _blocks(-low if block_type.minimum else torch.zeros_like(low), block_type)
    d = _to_float16(scale.amax(2) / _max_int(block_type.sc))
    dmin = _to_float16(minimum.amax(2) / _max_int(block_type.m), 0.0)
    sub_min = torch.where(dmin[..., None] > 0, minimum / dmin[..., None], 0.0)
    sub_min = sub_min.round_().clamp_(0, _max_int(block_type.m))
    return _grid(
        block_type,
        d,
        dmin,
        (scale / d[..., None]).round_().clamp_(1, _max_int(block_type.sc)),
        sub_min if block_type.minimum else sub_min * 0,
    )


@dataclass(frozen=True, eq=False)
class Quadratic:
    """The squared error of each group given its codes, a S^2 + 2 b S B + c B^2 - 2 s S - 2 t B + rest.

    The coefficients are [rows, blocks, groups of a block]. Types without a minimum have b = c = t = 0, and S alone.
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
        """The real S and B <= 0 of the least error; S = 0 where all codes are the same."""
        determinant = self.a * self.c - self.b * self.b
        joint = torch.where(
            determinant > 1e-7 * self.a * self.c, (self.s * self.c - self.b * self.t) / determinant, 0.0
        )
        scale = torch.where(
            (joint > 0) & (self.offset(joint) < 0), joint, torch.where(self.a > 0, self.s / self.a, 0.0)
        )
        return scale, self.offset(scale)

    def scale(self, offset: Tensor) -> Tensor:
        """The best real S >= 0 given B."""
        return torch.where(self.a > 0, (self.s - self.b * offset) / self.a, 0.0).clamp(min=0)

    def offset(self, scale: Tensor) -> Tensor:
        """The best real B <= 0 given S."""
        return torch.where(self.c > 0, (self.t - self.b * scale) / self.c, 0.0).clamp(max=0)


class _GroupSums:
    """Sums over the groups of a weight ``weight`` [rows, cols] with importances ``share`` of the same shape."""

    def __init__(self, weight: Tensor, share: Tensor, block_type: BlockType) -> None:
        self.weight, self.share, self.block_type = weight, share, block_type

    def quadratic(self, codes: Tensor) -> Quadratic:
        """The error of each group as a function of its scale and offset, given the codes."""
        unit = self._cut(codes.float() - self.block_type.middle)
        weight, share = self._cut(self.weight), self._cut(self.share)
        shared = share * unit
        a, s = (shared * unit).sum(3), (shared * weight).sum(3)
        if not self.block_type.minimum:
            return Quadratic(a, torch.zeros_like(a), torch.zeros_like(a), s, torch.zeros_like(a))
        return Quadratic(a, shared.sum(3), share.sum(3), s, (share * weight).sum(3))

    def objective(self, grid: KTypeGrid) -> Tensor:
        """The weighted squared error of each superblock, [rows, blocks], with the nearest codes."""
        error = grid.dequantize(grid.nearest(self.weight)).sub_(self.weight).square_().mul_(self.share)
        return self._cut(error).sum((2, 3))

    def _cut(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(len(matrix), -1, self.block_type.cols // self.block_type.group, self.block_type.group)


def choose_integers(error: Quadratic, block_type: BlockType) -> KTypeGrid:
    """The grid of low error given the codes.

    First d among candidates around the largest S over the largest integer, with offsets still real; then dmin likewise;
    then for each group the best of three sub-scales, each with its best sub-minimum (and the other way round).
    """
    scale, offset = error.best()
    if not block_type.minimum:  # S alone: the nearest integer is the best
        d = _search(
            scale.abs(), block_type.sc, lambda d: error.at(_nearest(scale, d, block_type) * d[..., None], offset)
        )
        return _grid(block_type, d, torch.zeros_like(d), _nearest(scale, d, block_type), torch.zeros_like(scale))
    scale = scale.clamp(min=0)
    d = _search(scale, block_type.sc, lambda d: _integers(error, scale, d, None, block_type)[2])
    dmin = _search(-offset, block_type.m, lambda dmin: _integers(error, scale, d, dmin, block_type)[2], 0.0)
    return _grid(block_type, d, dmin, *_integers(error, scale, d, dmin, block_type)[:2])


def _integers(
    error: Quadratic, scale: Tensor, d: Tensor, dmin: Tensor | None, block_type: BlockType
) -> tuple[Tensor, Tensor, Tensor]:
    """For each group the pair of integers of the least error, and that error.

    Candidates are the three sub-scales next to S / d, each with its best sub-minimum, and the two sub-minima next to
    -B / dmin, each with its best sub-scale. Where ``dmin`` is None, offsets are real.
    """
    nearest, zero = _nearest(scale, d, block_type), torch.zeros_like(scale)
    tried = [((nearest + step).clamp(1, _max_int(block_type.sc)), zero) for step in (0, -1, 1)]
    if dmin is not None:
        unit = dmin[..., None]
        ratio = torch.where(unit > 0, -error.offset(scale) / unit, 0.0)
        minima = [m.clamp(0, _max_int(block_type.m)) for m in (ratio.floor(), ratio.ceil())]
        tried = [
            (
                sc,
                torch.where(unit > 0, -error.offset(sc * d[..., None]) / unit, 0.0)
                .round_()
                .clamp_(0, _max_int(block_type.m)),
            )
            for sc, _ in tried
        ]
        tried += [(_nearest(error.scale(-m * unit), d, block_type), m) for m in minima]
    sub_scale, sub_min, least = nearest, zero, torch.full_like(scale, torch.inf)
    for sc, m in tried:
        real = sc * d[..., None]
        cost = error.at(real, error.offset(real) if dmin is None else -m * dmin[..., None])
        better = cost < least
        sub_scale, sub_min, least = (
            torch.where(better, a, b) for a, b in ((sc, sub_scale), (m, sub_min), (cost, least))
        )
    return sub_scale, sub_min, least


def _nearest(scale: Tensor, d: Tensor, block_type: BlockType) -> Tensor:
    """S / d as a sub-scale: the nearest integer in the type's range that is not 0."""
    low, high = block_type.sc or (1, 1)
    ratio = (scale / d[..., None]).round_().clamp_(low, high)
    return torch.where(ratio == 0, torch.where(scale < 0, -1.0, 1.0), ratio).clamp_(low or 1)


def _search(
    values: Tensor, limits: tuple[int, int] | None, cost: Callable[[Tensor], Tensor], least: float = _SMALLEST
) -> Tensor:
    """The float16 number of each superblock, [rows, blocks], of the least sum of ``cost`` over its groups.

    Candidates are near max(values) / largest integer; ``values`` and the costs are [rows, blocks, groups of a block].
    """
    most = values.amax(2)
    best = _to_float16(most / _max_int(limits), least)
    found = cost(best).sum(2)
    for largest in _LARGEST_SUB_SCALES:
        tried = _to_float16(most / (largest * _max_int(limits)), least)
        value = cost(tried).sum(2)
        better = value < found
        best, found = torch.where(better, tried, best), torch.where(better, value, found)
    return best


def _to_float16(values: Tensor, least: float = _SMALLEST) -> Tensor:
    """``values`` rounded to float16, as float32, between ``least`` and the largest finite number."""
    return values.clamp(least, _LARGEST).half().float()


def _max_int(limits: tuple[int, int] | None) -> int:
    """The largest integer of a type's range; 1 where the type has none."""
    return limits[1] if limits else 1


def _blocks(values: Tensor, block_type: BlockType) -> Tensor:
    """[rows, groups] -> [rows, blocks, groups of a block]."""
    return values.reshape(len(values), -1, block_type.cols // block_type.group)


def _grid(block_type: BlockType, d: Tensor, dmin: Tensor, sub_scale: Tensor, sub_min: Tensor) -> KTypeGrid:
    scales, minima = (values.flatten(1).to(torch.int16) for values in (sub_scale, sub_min))
    return KTypeGrid(block_type=block_type, d=d, dmin=dmin, sub_scale=scales, sub_min=minima)


def _select_blocks(better: Tensor, grid: KTypeGrid, other: KTypeGrid) -> KTypeGrid:
    """The superblocks of ``grid`` where ``better`` [rows, blocks], those of ``other`` elsewhere."""
    wide = better.repeat_interleave(grid.block_type.cols // grid.block_type.group, dim=1)
    pairs = {name: (better, getattr(grid, name), getattr(other, name)) for name in ("d", "dmin")}
    pairs |= {name: (wide, getattr(grid, name), getattr(other, name)) for name in ("sub_scale", "sub_min")}
    return replace(grid, **{name: torch.where(*values) for name, values in pairs.items()})

"""Affine grids with a stored offset, S q + B: what MLX (scale and bias) and llama.cpp's Q4_1 and Q5_1 hold.

Unlike in S (q - Z), the offset B is a number of its own: it is rounded to the dtype in which it is stored, and need not
be a multiple of S."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float, Float64, Int, UInt8
from torch import Tensor

from leangrid import kernels
from leangrid.errors import ShapeError
from leangrid.grids.affine import fit_affine, round_scale, same_sign
from leangrid.grids.base import GroupedGrid, Precision, check_weight, group_columns
from leangrid.grids.nonuniform import round_levels
from leangrid.recipe import Recipe
from leangrid.schemes import Scheme

_ROUNDS = 2  # how often S and B are solved for, given the codes, and the codes chosen again


@dataclass(frozen=True, eq=False)
class OffsetGrid(GroupedGrid):
    """Levels ``scale`` * q + ``offset``, one pair for each row and group of ``group_size`` columns.

    Attributes:
        scale: float32 [rows, groups], finite and not zero.
        offset: float32 [rows, groups], finite.
        bits: a code is below 2^bits.
        group_size: columns of a group; None means the whole row.
    """

    scale: Float[Tensor, "rows groups"]
    offset: Float[Tensor, "rows groups"]
    bits: int
    group_size: int | None = None

    FIT_SECONDS_PER_WEIGHT: ClassVar[float] = 6e-8

    def __post_init__(self) -> None:
        if self.scale.shape != self.offset.shape or self.scale.ndim != 2:
            raise ShapeError(
                f"scales {tuple(self.scale.shape)} and offsets {tuple(self.offset.shape)} do not match", "offset grid"
            )
        if not bool((self.scale.isfinite() & (self.scale != 0)).all()) or not bool(self.offset.isfinite().all()):
            raise ShapeError("a scale is zero, or a scale or an offset is NaN or infinite", "offset grid")

    @classmethod
    def fit(
        cls, weight: Tensor, loss_error_weights: Tensor, scheme: Scheme, recipe: Recipe, precision: Precision
    ) -> "OffsetGrid":
        found = fit_offset(weight, loss_error_weights, scheme.bits, recipe.steps, scheme.group_size, precision.dtype)
        return found.clamped(precision)

    @classmethod
    def fit_minmax(cls, weight: Tensor, scheme: Scheme, precision: Precision) -> "OffsetGrid":
        return fit_minmax_offset(weight, scheme.bits, scheme.group_size, precision.dtype).clamped(precision)

    @classmethod
    def spans_and_kinds(cls, scheme: Scheme, cols: int) -> tuple[int, int]:
        return super().spans_and_kinds(scheme, cols)[0], 2

    @classmethod
    def describe(cls, scheme: Scheme) -> str:
        return "affine grid (scale and offset)"

    @property
    def levels(self) -> Float[Tensor, "rows groups levels"]:
        """float32 [rows, groups, 2^bits], ascending where the scale is positive."""
        codes = torch.arange(2**self.bits, device=self.scale.device)
        return self.scale[..., None] * codes + self.offset[..., None]

    def dequantize(self, codes: Int[Tensor, "rows cols"] | UInt8[Tensor, "rows cols"]) -> Float[Tensor, "rows cols"]:
        """S q + B, float32: one rounded product and one rounded sum, as the readers compute it."""
        return (self._grouped(codes).float() * self.scale[..., None] + self.offset[..., None]).reshape(codes.shape)

    def nearest(self, weight: Float[Tensor, "rows cols"]) -> UInt8[Tensor, "rows cols"]:
        """clamp(rint((w - B) / S), 0, 2^b - 1): the same arithmetic as the sweep."""
        codes = ((self._grouped(weight) - self.offset[..., None]) / self.scale[..., None]).round_()
        return codes.clamp_(0, 2**self.bits - 1).to(torch.uint8).reshape(weight.shape)

    def rounded(self, dtype: torch.dtype) -> "OffsetGrid":
        """Scales and offsets rounded to ``dtype``; scales stay away from zero and infinity."""
        return replace(self, scale=round_scale(self.scale, dtype), offset=round_levels(self.offset, dtype))

    @property
    def zero(self) -> Float64[Tensor, "rows groups"]:
        """-B / S: the code, with a fraction, whose level would be 0."""
        return -self.offset.double() / self.scale.double()

    @property
    def parameters(self) -> Float[Tensor, "rows groups 2"]:
        return torch.stack((self.scale, self.offset), dim=2)

    def design(self, codes: UInt8[Tensor, "rows cols"]) -> Float[Tensor, "rows 2 cols"]:
        return torch.stack((codes.float(), torch.ones_like(codes, dtype=torch.float32)), dim=1)

    def with_parameters(self, parameters: Float[Tensor, "rows groups 2"], dtype: torch.dtype) -> "OffsetGrid":
        scale, offset = parameters.unbind(2)
        scale, offset = same_sign(scale, self.scale), torch.where(offset.isfinite(), offset, self.offset)
        return replace(self, scale=scale, offset=offset).rounded(dtype)

    def sweep_block(self, weight: Tensor, upper: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.sweep_offset(weight, upper, self.scale, self.offset, group, self.bits)

    def sweep_exact(self, weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
        group = self.group_of(weight.shape[1])
        return kernels.exact_affine(weight, inverse, self.scale.float(), self.zero, group, self.bits)

    def descend_block(self, gradient: Tensor, hessian: Tensor, codes: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.descend_offset(gradient, hessian, codes, self.scale, self.offset, group, self.bits)


def fit_minmax_offset(
    weight: Float[Tensor, "rows cols"], bits: int, group_size: int | None = None, scale_dtype: torch.dtype | None = None
) -> OffsetGrid:
    """Return the min-max grid of the baselines where offsets are stored: S = (hi - lo) / (2^b - 1) and B = lo.

    lo and hi are the extremes of each row or group; the range need not hold 0, so weights that lie on such a grid
    already stay on it. Both numbers are rounded to ``scale_dtype`` (None: float32).

    Raises:
        ShapeError: weights that are not finite, or a group size that does not divide the columns.
    """
    weight = check_weight(weight)
    grouped = weight.reshape(len(weight), -1, group_columns(weight.shape[1], group_size))
    low, high = grouped.aminmax(dim=2)
    span = high.double() - low.double()  # float64: the range of two float32 extremes may overflow float32
    scale = (span / (2**bits - 1)).float()
    return OffsetGrid(torch.where(scale > 0, scale, 1.0), low, bits, group_size).rounded(scale_dtype or torch.float32)


def fit_offset(
    weight: Float[Tensor, "rows cols"],
    loss_error_weights: Float[Tensor, " cols"] | Float[Tensor, "rows cols"],
    bits: int = 4,
    steps: int = 2048,
    group_size: int | None = None,
    scale_dtype: torch.dtype | None = None,
) -> OffsetGrid:
    """Return a grid S q + B of low weighted squared error: that of the affine search, improved by least squares.

    Args:
        loss_error_weights: g, float and above 0, in original column order: [cols] for all rows, or [rows, cols].
        steps: T of the affine search.
        group_size: columns of a group; None means the whole row.
        scale_dtype: the dtype in which scale and offset are stored (None: float32). Both are rounded to it before a
            change is judged, and a group takes a change only if its objective falls.

    Raises:
        ShapeError: weights that are not finite, or a group size that does not divide the columns.
    """
    weight, dtype = check_weight(weight), scale_dtype or torch.float32
    grouped = weight.reshape(len(weight), -1, group_columns(weight.shape[1], group_size))
    share = loss_error_weights.expand_as(weight).reshape(grouped.shape)
    # Start: the affine search, whose ranges hold 0; a range without 0 is moved onto it first.
    low, high = grouped.aminmax(dim=2)
    middle = torch.where((low > 0) | (high < 0), 0.5 * low + 0.5 * high, 0.0)
    centred = (grouped - middle[..., None]).reshape(weight.shape)
    start = fit_affine(centred, loss_error_weights, bits, steps, group_size, scale_dtype=dtype)
    grid = OffsetGrid(start.scale, middle - start.scale * start.zero_point, bits, group_size).rounded(dtype)
    share = (share / share.sum(2, keepdim=True)).float()
    mean = (share * grouped).sum(2)
    codes, best = _nearest_and_error(grid, grouped, share)
    for _ in range(_ROUNDS):
        # Weighted linear regression of the weights on their codes: the slope is S, the intercept B.
        average = (share * codes).sum(2)
        spread = codes - average[..., None]
        scale = same_sign((share * spread * grouped).sum(2) / (share * spread.square()).sum(2), grid.scale)
        offset = mean - round_scale(scale, dtype) * average
        tried = grid.with_parameters(torch.stack((scale, offset), dim=2), dtype)
        new, objective = _nearest_and_error(tried, grouped, share)
        better = objective < best
        if not bool(better.any()):
            break
        scale, offset = (torch.where(better, a, b) for a, b in ((tried.scale, grid.scale), (tried.offset, grid.offset)))
        grid, best = replace(grid, scale=scale, offset=offset), torch.where(better, objective, best)
        codes = torch.where(better[..., None], new, codes)
    return grid


def _nearest_and_error(grid: OffsetGrid, grouped: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest codes, float32 [rows, groups, size], and the weighted squared error of each group."""
    scale, offset = grid.scale[..., None], grid.offset[..., None]
    codes = ((grouped - offset) / scale).round_().clamp_(0, 2**grid.bits - 1)
    return codes, (codes * scale).add_(offset).sub_(grouped).square_().mul_(share).sum(2)

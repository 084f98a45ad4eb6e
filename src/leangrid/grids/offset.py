"""Affine grids with a stored offset, S q + B: what MLX (scale and bias) and llama.cpp's blocks with a minimum hold.

Unlike S (q - Z) the offset is a number of its own, rounded to the dtype it is stored in, and need not be a multiple of
S."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Float64, Int, UInt8
from torch import Tensor

from leangrid import kernels
from leangrid.errors import ShapeError
from leangrid.grids.affine import fit_affine, round_scale, same_sign
from leangrid.grids.base import GroupedGrid, check_weight, group_columns
from leangrid.grids.nonuniform import round_levels


@dataclass(frozen=True, eq=False)
class OffsetGrid(GroupedGrid):
    """Levels ``scale`` * q + ``offset``, one pair for each row and group of ``group_size`` columns (None: whole row).

    ``scale`` float32 [rows, groups], finite, not zero; ``offset`` float32 [rows, groups], finite.
    """

    scale: Float[Tensor, "rows groups"]
    offset: Float[Tensor, "rows groups"]
    bits: int
    group_size: int | None = None

    def __post_init__(self) -> None:
        if self.scale.shape != self.offset.shape or self.scale.ndim != 2:
            raise ShapeError(
                f"scales {tuple(self.scale.shape)} and offsets {tuple(self.offset.shape)} do not match", "offset grid"
            )
        if not bool((self.scale.isfinite() & (self.scale != 0)).all()) or not bool(self.offset.isfinite().all()):
            raise ShapeError("a scale is zero, or a scale or an offset is NaN or infinite", "offset grid")

    @property
    def levels(self) -> Float[Tensor, "rows groups levels"]:
        """float32 [rows, groups, 2^bits], ascending where the scale is positive."""
        codes = torch.arange(2**self.bits, device=self.scale.device)
        return self.scale[..., None] * codes + self.offset[..., None]

    def dequantize(self, codes: Int[Tensor, "rows cols"] | UInt8[Tensor, "rows cols"]) -> Float[Tensor, "rows cols"]:
        """float32 S q + B: one rounded product, one rounded sum, as the readers compute it."""
        return (self._grouped(codes).float() * self.scale[..., None] + self.offset[..., None]).reshape(codes.shape)

    def nearest(self, weight: Float[Tensor, "rows cols"]) -> UInt8[Tensor, "rows cols"]:
        """clamp(rint((w - B) / S), 0, 2^b - 1): the same arithmetic as the sweep."""
        codes = ((self._grouped(weight) - self.offset[..., None]) / self.scale[..., None]).round_()
        return codes.clamp_(0, 2**self.bits - 1).to(torch.uint8).reshape(weight.shape)

    def rounded(self, dtype: torch.dtype) -> "OffsetGrid":
        """Scales and offsets rounded to ``dtype``; scales kept away from zero and infinity."""
        return replace(self, scale=round_scale(self.scale, dtype), offset=round_levels(self.offset, dtype))

    @property
    def zero(self) -> Float64[Tensor, "rows groups"]:
        return -self.offset.double() / self.scale.double()

    @property
    def free(self) -> Float[Tensor, "rows groups 2"]:
        return torch.stack((self.scale, self.offset), dim=2)

    def units(self, codes: UInt8[Tensor, "rows cols"]) -> Float[Tensor, "rows 2 cols"]:
        return torch.stack((codes.float(), torch.ones_like(codes, dtype=torch.float32)), dim=1)

    def refitted(self, free: Float[Tensor, "rows groups 2"], dtype: torch.dtype) -> "OffsetGrid":
        scale, offset = (
            same_sign(free[..., 0], self.scale),
            torch.where(free[..., 1].isfinite(), free[..., 1], self.offset),
        )
        return replace(self, scale=scale, offset=offset).rounded(dtype)

    def sweep_block(self, weight: Tensor, upper: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.sweep_offset(weight, upper, self.scale, self.offset, group, self.bits)

    def descend_block(self, gradient: Tensor, hessian: Tensor, codes: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.descend_offset(gradient, hessian, codes, self.scale, self.offset, group, self.bits)


def minmax_offset(
    weight: Float[Tensor, "rows cols"], bits: int, group_size: int | None = None, scale_dtype: torch.dtype | None = None
) -> OffsetGrid:
    """S = (hi - lo) / (2^b - 1), B = lo of each row or group, both rounded to ``scale_dtype``: the baseline where
    offsets are stored.

    The range need not hold 0, and weights that lie on such a grid already stay on it. Raises ShapeError as fit_offset
    does."""
    weight = check_weight(weight)
    grouped = weight.reshape(len(weight), -1, group_columns(weight.shape[1], group_size))
    low, high = grouped.aminmax(dim=2)
    scale = (
        (high.double() - low.double()) / (2**bits - 1)
    ).float()  # float64: a range of two float32 extremes may overflow float32
    return OffsetGrid(torch.where(scale > 0, scale, 1.0), low, bits, group_size).rounded(scale_dtype or torch.float32)


def fit_offset(
    weight: Float[Tensor, "rows cols"],
    loss_error_weights: Float[Tensor, " cols"] | Float[Tensor, "rows cols"],
    bits: int = 4,
    steps: int = 2048,
    group_size: int | None = None,
    scale_dtype: torch.dtype | None = None,
    rounds: int = 2,
) -> OffsetGrid:
    """The affine search's grid, then ``rounds`` of weighted least squares on scale and offset given the codes.

    Args:
        loss_error_weights: g_j > 0, float, original column order; shared by the rows or one a row.
        steps: T, the resolution of the shrunken range.
        group_size: columns a grid; None for whole rows.
        scale_dtype: dtype that scale and offset are stored in; both are rounded to it before a step is judged, and a
            step is kept only by the groups whose objective it lowers.

    Raises:
        ShapeError: weights that are not finite, or a group size that does not divide the columns.
    """
    weight, dtype = check_weight(weight), scale_dtype or torch.float32
    grouped = weight.reshape(len(weight), -1, group_columns(weight.shape[1], group_size))
    share = loss_error_weights.expand_as(weight).reshape(grouped.shape)
    low, high = grouped.aminmax(dim=2)
    middle = torch.where(
        (low > 0) | (high < 0), 0.5 * low + 0.5 * high, 0.0
    )  # a range without 0 need not be stretched to it
    start = fit_affine(
        (grouped - middle[..., None]).reshape(weight.shape),
        loss_error_weights,
        bits,
        steps,
        group_size,
        scale_dtype=dtype,
    )
    grid = OffsetGrid(start.scale, middle - start.scale * start.zero_point, bits, group_size).rounded(dtype)
    share = (share / share.sum(2, keepdim=True)).float()
    mean = (share * grouped).sum(2)
    codes, best = _judged(grid, grouped, share)
    for _ in range(rounds):
        average = (share * codes).sum(2)
        spread = codes - average[..., None]
        scale = same_sign((share * spread * grouped).sum(2) / (share * spread.square()).sum(2), grid.scale)
        tried = grid.refitted(torch.stack((scale, mean - round_scale(scale, dtype) * average), dim=2), dtype)
        new, objective = _judged(tried, grouped, share)
        better = objective < best
        if not bool(better.any()):
            break
        scale, offset = (torch.where(better, a, b) for a, b in ((tried.scale, grid.scale), (tried.offset, grid.offset)))
        grid, best = replace(grid, scale=scale, offset=offset), torch.where(better, objective, best)
        codes = torch.where(better[..., None], new, codes)
    return grid


def _judged(grid: OffsetGrid, grouped: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest codes, float32 [rows, groups, size], and the weighted squared error of each group."""
    scale, offset = grid.scale[..., None], grid.offset[..., None]
    codes = ((grouped - offset) / scale).round_().clamp_(0, 2**grid.bits - 1)
    return codes, (codes * scale).add_(offset).sub_(grouped).square_().mul_(share).sum(2)

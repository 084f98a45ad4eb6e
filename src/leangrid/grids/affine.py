"""Affine grids S (q - Z), q = 0..2^b-1: learned by enumerating shrunken ranges, per row or per group of columns.

Objective, per row and group: min over (S, Z) of sum_j g_j (S (q_j - Z) - w_j)^2, over the paper's candidates
lo = min w + a R/T, hi = max w - c R/T with 0 <= a, c < t, de-duplicated to the distinct (S, Z); the search is exact
inside t, which also regularises: lower objectives beyond it gave no lower layer loss.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Float64, Int, UInt8
from torch import Tensor

from leangrid import kernels
from leangrid.errors import ShapeError
from leangrid.grids.base import GroupedGrid, check_weight, group_columns

SHRINK = {
    2: 0.4,
    3: 0.3,
}  # t / T, the paper's share of the range that may be cut at either end; 0.2 for 4 bits and more


@dataclass(frozen=True, eq=False)
class AffineGrid(GroupedGrid):
    """Levels ``scale`` * (q - ``zero_point``), one pair for each row and group of ``group_size`` columns (None: whole
    row).

    ``scale`` is float32 [rows, groups], finite, not zero (negative only in symmetric grids); ``zero_point`` uint8
    [rows, groups], below 2^bits.
    """

    scale: Float[Tensor, "rows groups"]
    zero_point: UInt8[Tensor, "rows groups"]
    bits: int
    group_size: int | None = None

    def __post_init__(self) -> None:
        if self.scale.shape != self.zero_point.shape or self.scale.ndim != 2:
            raise ShapeError(
                f"scales {tuple(self.scale.shape)} and zero points {tuple(self.zero_point.shape)} do not match",
                "affine grid",
            )
        if not bool((self.scale.isfinite() & (self.scale != 0)).all()):
            raise ShapeError("a scale is zero, NaN or infinite", "affine grid")
        if self.zero_point.numel() and int(self.zero_point.max()) >= 2**self.bits:
            raise ShapeError(f"a zero point is outside 0..{2**self.bits - 1}", "affine grid")

    @property
    def levels(self) -> Float[Tensor, "rows groups levels"]:
        """float32 [rows, groups, 2^bits], ascending where the scale is positive."""
        codes = torch.arange(2**self.bits, device=self.scale.device)
        return self.scale[..., None] * (codes - self.zero_point[..., None].int())

    def dequantize(self, codes: Int[Tensor, "rows cols"] | UInt8[Tensor, "rows cols"]) -> Float[Tensor, "rows cols"]:
        """float32 S (q - Z)."""
        return ((self._grouped(codes).float() - self.zero_point[..., None]) * self.scale[..., None]).reshape(
            codes.shape
        )

    def nearest(self, weight: Float[Tensor, "rows cols"]) -> UInt8[Tensor, "rows cols"]:
        """clamp(rint(w/S + Z), 0, 2^b - 1): the same arithmetic as the sweep."""
        codes = (self._grouped(weight) / self.scale[..., None] + self.zero_point[..., None]).round_()
        return codes.clamp_(0, 2**self.bits - 1).to(torch.uint8).reshape(weight.shape)

    def rounded(self, dtype: torch.dtype) -> "AffineGrid":
        """Scales rounded to ``dtype``, kept away from zero and infinity."""
        return replace(self, scale=round_scale(self.scale, dtype))

    @property
    def zero(self) -> Float64[Tensor, "rows groups"]:
        return self.zero_point.double()

    @property
    def free(self) -> Float[Tensor, "rows groups 1"]:
        return self.scale[..., None]

    def units(self, codes: UInt8[Tensor, "rows cols"]) -> Float[Tensor, "rows 1 cols"]:
        return (self._grouped(codes).float() - self.zero_point[..., None]).reshape(len(codes), 1, -1)

    def refitted(self, free: Float[Tensor, "rows groups 1"], dtype: torch.dtype) -> "AffineGrid":
        return replace(self, scale=round_scale(same_sign(free[..., 0], self.scale), dtype))

    def sweep_block(self, weight: Tensor, upper: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.sweep_affine(weight, upper, self.scale, self.zero_point, group, self.bits)

    def descend_block(self, gradient: Tensor, hessian: Tensor, codes: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.descend_affine(gradient, hessian, codes, self.scale, self.zero_point, group, self.bits)

    def regrouped(self, cols: int, group_size: int | None) -> "AffineGrid":
        """The same levels in shorter groups, each pair repeated; ShapeError where they do not divide the groups it
        has."""
        size, own = group_columns(cols, group_size), group_columns(cols, self.group_size)
        if own % size:
            raise ShapeError(
                f"groups of {size} do not divide groups of {own} columns", "affine grid", "Use a group size that does"
            )
        scale, zero_point = (tensor.repeat_interleave(own // size, dim=1) for tensor in (self.scale, self.zero_point))
        return replace(self, scale=scale, zero_point=zero_point, group_size=group_size)


def same_sign(new: Float[Tensor, "*shape"], old: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """``new``, but ``old`` wherever a scale would vanish, change its sign, or stop being finite."""
    return torch.where(new.isfinite() & (new * old.sign() > 0), new, old)


def round_scale(scale: Float[Tensor, "*shape"], dtype: torch.dtype | None) -> Float[Tensor, "*shape"]:
    """``scale`` rounded to ``dtype`` and back to float32; magnitudes stay inside the dtype's normal range."""
    if dtype is None or dtype == torch.float32:
        return scale.float()
    info = torch.finfo(dtype)
    magnitude = scale.float().abs().to(dtype).float().clamp(info.smallest_normal, info.max)
    return torch.copysign(magnitude, scale.float())


def fit_affine(
    weight: Float[Tensor, "rows cols"],
    loss_error_weights: Float[Tensor, " cols"] | Float[Tensor, "rows cols"],
    bits: int = 4,
    steps: int = 2048,
    group_size: int | None = None,
    symmetric: bool = False,
    scale_dtype: torch.dtype | None = None,
) -> AffineGrid:
    """The best affine grid among the paper's candidates, for the weighted squared error (LeanQuant section 3.2).

    Args:
        loss_error_weights: g_j > 0, float, original column order; shared by the rows or one a row.
        steps: T, the resolution of the shrunken range.
        group_size: columns a grid; None for whole rows.
        symmetric: Z fixed at 2^(b-1), S of either sign.
        scale_dtype: dtype the scale is stored in; it is rounded before a candidate is scored.

    Raises:
        ShapeError: weights that are not finite, or a group size that does not divide the columns.
    """
    weight = check_weight(weight)
    size = group_columns(weight.shape[1], group_size)
    scale, zero_point, _ = kernels.affine_search(
        weight,
        loss_error_weights.double().contiguous(),
        bits,
        steps,
        SHRINK.get(bits, 0.2),
        size,
        symmetric,
        scale_dtype,
    )
    return AffineGrid(scale, zero_point, bits, group_size)

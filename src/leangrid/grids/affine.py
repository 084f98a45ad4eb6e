"""Affine grids S (q - Z), q = 0..2^b - 1: learned by trying shrunken ranges, or min-max.

The learned grid minimises, for each row and group, sum_j g_j (S (q_j - Z) - w_j)^2 over the candidates of the paper
(LeanQuant section 3.2): with R = max w - min w, the range from min w + a R/T to max w - c R/T for all integers
0 <= a, c < t. Candidates with the same (S, Z) are tried once, and the best is found exactly. Larger t lowers the
objective further, but not the loss of the layer: t regularises."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float, Float64, Int, UInt8
from torch import Tensor

from leangrid import kernels
from leangrid.errors import ShapeError
from leangrid.grids.base import GroupedGrid, Precision, check_weight, group_columns
from leangrid.recipe import Recipe
from leangrid.schemes import Scheme

SHRINK = {2: 0.4, 3: 0.3}  # t / T: the share of the range that may be cut at either end (the paper's numbers)
SHRINK_WIDE = 0.2  # the same for 4 bits and more


@dataclass(frozen=True, eq=False)
class AffineGrid(GroupedGrid):
    """Levels ``scale`` * (q - ``zero_point``), one pair for each row and group of ``group_size`` columns.

    Attributes:
        scale: float32 [rows, groups], finite and not zero; negative only in symmetric grids.
        zero_point: uint8 [rows, groups], below 2^bits.
        bits: a code is below 2^bits.
        group_size: columns of a group; None means the whole row.
    """

    scale: Float[Tensor, "rows groups"]
    zero_point: UInt8[Tensor, "rows groups"]
    bits: int
    group_size: int | None = None

    FIT_SECONDS_PER_WEIGHT: ClassVar[float] = 3.5e-8

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

    @classmethod
    def fit(
        cls, weight: Tensor, loss_error_weights: Tensor, scheme: Scheme, recipe: Recipe, precision: Precision
    ) -> "AffineGrid":
        found = fit_affine(
            weight,
            loss_error_weights,
            scheme.bits,
            recipe.steps,
            scheme.group_size,
            scheme.symmetric,
            precision.dtype,
        )
        return found.clamped(precision)

    @classmethod
    def fit_minmax(cls, weight: Tensor, scheme: Scheme, precision: Precision) -> "AffineGrid":
        found = fit_minmax(weight, scheme.bits, scheme.group_size, scheme.symmetric, precision.dtype)
        return found.clamped(precision)

    @classmethod
    def describe(cls, scheme: Scheme) -> str:
        return "affine grid (scale and zero point)"

    @property
    def levels(self) -> Float[Tensor, "rows groups levels"]:
        """float32 [rows, groups, 2^bits], ascending where the scale is positive."""
        codes = torch.arange(2**self.bits, device=self.scale.device)
        return self.scale[..., None] * (codes - self.zero_point[..., None].int())

    def dequantize(self, codes: Int[Tensor, "rows cols"] | UInt8[Tensor, "rows cols"]) -> Float[Tensor, "rows cols"]:
        """S (q - Z), float32."""
        return ((self._grouped(codes).float() - self.zero_point[..., None]) * self.scale[..., None]).reshape(
            codes.shape
        )

    def nearest(self, weight: Float[Tensor, "rows cols"]) -> UInt8[Tensor, "rows cols"]:
        """clamp(rint(w / S + Z), 0, 2^b - 1): the same arithmetic as the sweep."""
        codes = (self._grouped(weight) / self.scale[..., None] + self.zero_point[..., None]).round_()
        return codes.clamp_(0, 2**self.bits - 1).to(torch.uint8).reshape(weight.shape)

    def rounded(self, dtype: torch.dtype) -> "AffineGrid":
        """Scales rounded to ``dtype``, away from zero and infinity; zero points are integers already."""
        return replace(self, scale=round_scale(self.scale, dtype))

    @property
    def zero(self) -> Float64[Tensor, "rows groups"]:
        """The zero point as float64."""
        return self.zero_point.double()

    @property
    def parameters(self) -> Float[Tensor, "rows groups 1"]:
        return self.scale[..., None]

    def design(self, codes: UInt8[Tensor, "rows cols"]) -> Float[Tensor, "rows 1 cols"]:
        return (self._grouped(codes).float() - self.zero_point[..., None]).reshape(len(codes), 1, -1)

    def with_parameters(self, parameters: Float[Tensor, "rows groups 1"], dtype: torch.dtype) -> "AffineGrid":
        return replace(self, scale=round_scale(same_sign(parameters[..., 0], self.scale), dtype))

    def sweep_block(self, weight: Tensor, upper: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.sweep_affine(weight, upper, self.scale, self.zero_point, group, self.bits)

    def sweep_exact(self, weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
        group = self.group_of(weight.shape[1])
        return kernels.exact_affine(weight, inverse, self.scale.float(), self.zero, group, self.bits)

    def descend_block(self, gradient: Tensor, hessian: Tensor, codes: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.descend_affine(gradient, hessian, codes, self.scale, self.zero_point, group, self.bits)

    def regrouped(self, cols: int, group_size: int | None) -> "AffineGrid":
        """The same levels in shorter groups of ``group_size`` columns; ``cols`` is the length of a row.

        Raises:
            ShapeError: the new groups do not divide the present ones.
        """
        size, own = group_columns(cols, group_size), group_columns(cols, self.group_size)
        if own % size:
            raise ShapeError(
                f"groups of {size} do not divide groups of {own} columns", "affine grid", "Use a group size that does"
            )
        scale, zero_point = (tensor.repeat_interleave(own // size, dim=1) for tensor in (self.scale, self.zero_point))
        return replace(self, scale=scale, zero_point=zero_point, group_size=group_size)


def same_sign(new: Float[Tensor, "*shape"], old: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """``new``, but ``old`` wherever the new scale is zero, not finite, or of the other sign."""
    return torch.where(new.isfinite() & (new * old.sign() > 0), new, old)


def round_scale(scale: Float[Tensor, "*shape"], dtype: torch.dtype | None) -> Float[Tensor, "*shape"]:
    """``scale`` rounded to ``dtype`` (None: float32), as float32; magnitudes stay inside the dtype's normal range.

    In float16 that is 2^-14 (6.1e-5) and more: a subnormal has fewer than 11 bits, and min-max grids are not compared
    after rounding. The affine search (``kernels.plain.affine.SCALE_LIMITS``) and the d of K types may be subnormal,
    down to 2^-24, because there every candidate is scored as it is stored.
    """
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
    """Return the affine grid of the least weighted squared error among the candidates of LeanQuant section 3.2.

    Args:
        weight: any float dtype, [rows, cols].
        loss_error_weights: g, float and above 0, in original column order: [cols] for all rows, or [rows, cols].
        bits: a code is below 2^bits.
        steps: T; the range is shrunk in steps of its T-th part.
        group_size: columns that share a scale and a zero point; None means the whole row.
        symmetric: fix Z at 2^(bits - 1); S then has either sign.
        scale_dtype: the dtype in which the scale is stored. A candidate's scale is rounded to it before the candidate
            is scored; None means float32.

    Raises:
        ShapeError: weights that are not finite, or a group size that does not divide the columns.

    Example:
        >>> import torch
        >>> from leangrid.grids import fit_affine
        >>> weight = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
        >>> grid = fit_affine(weight, torch.ones(4), bits=2)
        >>> grid.scale, grid.zero_point
        (tensor([[1.]]), tensor([[0]], dtype=torch.uint8))
        >>> codes = grid.nearest(weight)
        >>> grid.dequantize(codes)
        tensor([[0., 1., 2., 3.]])
    """
    weight = check_weight(weight)
    size = group_columns(weight.shape[1], group_size)
    scale, zero_point, _ = kernels.affine_search(
        weight,
        loss_error_weights.double().contiguous(),
        bits,
        steps,
        SHRINK.get(bits, SHRINK_WIDE),
        size,
        symmetric,
        scale_dtype,
    )
    return AffineGrid(scale, zero_point, bits, group_size)


def fit_minmax(
    weight: Float[Tensor, "rows cols"],
    bits: int,
    group_size: int | None = None,
    symmetric: bool = False,
    scale_dtype: torch.dtype | None = None,
) -> AffineGrid:
    """Return the min-max grid, which the baselines GPTQ and rounding use.

    With lo = min(w, 0) and hi = max(w, 0) of each group, S = (hi - lo) / (2^b - 1) and Z = rint(-lo / S); if
    ``symmetric``, S = 2 max|w| / (2^b - 1) and Z = 2^(b - 1). S is rounded to ``scale_dtype`` (None: float32); it is 1
    for a group of zeros. ``group_size`` is the columns of a group; None means the whole row.

    Raises:
        ShapeError: weights that are not finite, or a group size that does not divide the columns.

    Example:
        >>> import torch
        >>> from leangrid.grids import fit_minmax
        >>> grid = fit_minmax(torch.tensor([[-1.0, 0.0, 1.0, 2.0]]), bits=2)
        >>> grid.scale, grid.zero_point
        (tensor([[1.]]), tensor([[1]], dtype=torch.uint8))
    """
    weight = check_weight(weight)
    grouped = weight.reshape(weight.shape[0], -1, group_columns(weight.shape[1], group_size))
    lo, hi = (extreme.double() for extreme in grouped.aminmax(dim=2))
    lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    if symmetric:
        hi = torch.maximum(hi, -lo)
        lo = -hi
    span = hi - lo  # float64: the range of two float32 extremes may overflow float32
    scale = (span / (2**bits - 1)).float()
    scale = round_scale(torch.where(scale > 0, scale, torch.ones_like(scale)), scale_dtype)
    if symmetric:
        zero_point = torch.full_like(scale, 2 ** (bits - 1))
    else:
        zero_point = (-lo / scale).round().clamp(0, 2**bits - 1)
    return AffineGrid(scale, zero_point.to(torch.uint8), bits, group_size)

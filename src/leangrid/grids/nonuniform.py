"""Non-uniform grids: K free levels a row, the optimum of weighted one-dimensional k-means.

Objective, per row: min over levels of sum_j g_j (nearest(w_j) - w_j)^2. "optimal" finds the global optimum by dynamic
programming over the sorted row; "lloyd" alternates from a deterministic start.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from leangrid import kernels
from leangrid.errors import ShapeError
from leangrid.grids.base import Grid, check_weight


@dataclass(frozen=True, eq=False)
class NonuniformGrid(Grid):
    """``levels`` float32 [rows, K], K = 2^bits, sorted and finite; duplicates are allowed."""

    levels: Float[Tensor, "rows levels"]

    def __post_init__(self) -> None:
        count = self.levels.shape[-1]
        if self.levels.ndim != 2 or count & (count - 1) or not 2 <= count <= 256:
            raise ShapeError(
                f"levels of shape {tuple(self.levels.shape)}: the number of levels is a power of two up to 256",
                "non-uniform grid",
            )
        if not bool(self.levels.isfinite().all()) or bool((self.levels.diff(dim=1) < 0).any()):
            raise ShapeError("levels are not finite and ascending", "non-uniform grid")

    @property
    def bits(self) -> int:
        """log2 of the number of levels."""
        return self.levels.shape[1].bit_length() - 1

    def dequantize(self, codes: Int[Tensor, "rows cols"] | UInt8[Tensor, "rows cols"]) -> Float[Tensor, "rows cols"]:
        """float32 levels[row, code]."""
        return self.levels.gather(1, codes.long())

    def nearest(self, weight: Float[Tensor, "rows cols"]) -> UInt8[Tensor, "rows cols"]:
        """The number of midpoints below the weight: ties go to the lower level, as in the sweep."""
        midpoints = 0.5 * (self.levels[:, :-1] + self.levels[:, 1:])
        return torch.searchsorted(midpoints, weight.float().contiguous()).to(torch.uint8)

    def rounded(self, dtype: torch.dtype) -> "NonuniformGrid":
        """Levels rounded to ``dtype``, inside its finite range."""
        return NonuniformGrid(round_levels(self.levels, dtype))

    def group_of(self, cols: int) -> Int[Tensor, " cols"]:
        """All columns are in one group."""
        return torch.zeros(cols, dtype=torch.int32, device=self.levels.device)

    def sweep_block(self, weight: Tensor, upper: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.sweep_levels(weight, upper, self.levels)

    def descend_block(self, gradient: Tensor, hessian: Tensor, codes: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.descend_levels(gradient, hessian, codes, self.levels)


def round_levels(levels: Float[Tensor, "rows levels"], dtype: torch.dtype) -> Float[Tensor, "rows levels"]:
    """``levels``, in any order, rounded to ``dtype`` (inside its finite range) and back to float32."""
    info = torch.finfo(dtype)
    return levels.clamp(info.min, info.max).to(dtype).float()


def fit_nonuniform(
    weight: Float[Tensor, "rows cols"],
    loss_error_weights: Float[Tensor, " cols"] | Float[Tensor, "rows cols"],
    levels: int = 16,
    search: Literal["optimal", "lloyd"] = "optimal",
) -> NonuniformGrid:
    """The best ``levels`` levels of each row for the weighted squared error (LeanQuant section 3.1).

    Args:
        loss_error_weights: g_j >= 0, float, original column order; shared by the rows or one a row.

    Raises:
        ShapeError: weights that are not finite, or a number of levels that is no power of two.
    """
    weight, importance = check_weight(weight), loss_error_weights.double().contiguous()
    fit = kernels.kmeans_dp if search == "optimal" else kernels.kmeans_lloyd
    return NonuniformGrid(fit(weight, importance, levels)[0])

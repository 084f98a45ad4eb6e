"""Non-uniform grids: 2^b free levels for each row, the optimum of weighted one-dimensional k-means.

The levels of a row minimise sum_j g_j (nearest(w_j) - w_j)^2 (LeanQuant section 3.1). The search "optimal" finds the
global optimum by dynamic programming over the sorted row; "lloyd" alternates assignment and means from a start that is
the same every time."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from leangrid import kernels
from leangrid.errors import ShapeError
from leangrid.grids.affine import AffineGrid
from leangrid.grids.base import Grid, Precision, check_weight
from leangrid.grids.least_squares import COPIES, objective_change, solve_ridged
from leangrid.recipe import Recipe
from leangrid.schemes import Scheme

_RIDGE = 1e-8  # of the refit of levels, in units of the mean diagonal of the normal equations
# Scratch of kernels.level_gram on a GPU: chunks of one-hot codes in float32 and float64, and their products.
_GRAM_BYTES = 6 * 4 << 25


@dataclass(frozen=True, eq=False)
class NonuniformGrid(Grid):
    """``levels`` float32 [rows, 2^bits], ascending and finite; two levels may be equal."""

    levels: Float[Tensor, "rows levels"]

    FIT_SECONDS_PER_WEIGHT: ClassVar[float] = 4.5e-8
    TUNING_STEPS: ClassVar[tuple[float, float]] = (0.005, 0.002)  # levels gain more than codes (docs/log.md)

    def __post_init__(self) -> None:
        count = self.levels.shape[-1]
        if self.levels.ndim != 2 or count & (count - 1) or not 2 <= count <= 256:
            raise ShapeError(
                f"levels of shape {tuple(self.levels.shape)}: the number of levels is a power of two up to 256",
                "non-uniform grid",
            )
        if not bool(self.levels.isfinite().all()) or bool((self.levels.diff(dim=1) < 0).any()):
            raise ShapeError("levels are not finite and ascending", "non-uniform grid")

    @classmethod
    def fit(
        cls, weight: Tensor, loss_error_weights: Tensor, scheme: Scheme, recipe: Recipe, precision: Precision
    ) -> "NonuniformGrid":
        return fit_nonuniform(weight, loss_error_weights, scheme.levels, recipe.search).rounded(precision.dtype)

    @classmethod
    def fit_minmax(cls, weight: Tensor, scheme: Scheme, precision: Precision) -> AffineGrid:
        """The baselines have equal steps: the affine min-max grid of whole rows."""
        return AffineGrid.fit_minmax(weight, scheme, precision)

    @classmethod
    def from_minmax(cls, minmax: AffineGrid, precision: Precision) -> "NonuniformGrid":
        return NonuniformGrid(minmax.levels[:, 0].contiguous()).rounded(precision.dtype)

    @classmethod
    def describe(cls, scheme: Scheme) -> str:
        return f"non-uniform grid of {scheme.levels} levels"

    @classmethod
    def refit_bytes(cls, scheme: Scheme, rows: int, cols: int, accelerated: bool) -> int:
        gram = min(_GRAM_BYTES, 6 * 4 * rows * cols * scheme.levels) if accelerated else 0
        return COPIES * 8 * rows * scheme.levels**2 + gram

    @property
    def bits(self) -> int:
        """log2 of the number of levels."""
        return self.levels.shape[1].bit_length() - 1

    def dequantize(self, codes: Int[Tensor, "rows cols"] | UInt8[Tensor, "rows cols"]) -> Float[Tensor, "rows cols"]:
        """levels[row, code], float32."""
        return self.levels.gather(1, codes.long())

    def nearest(self, weight: Float[Tensor, "rows cols"]) -> UInt8[Tensor, "rows cols"]:
        """The number of midpoints below the weight: of two levels at one distance the lower, as in the sweep."""
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

    def sweep_exact(self, weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.exact_levels(weight, inverse, self.levels)

    def descend_block(self, gradient: Tensor, hessian: Tensor, codes: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.descend_levels(gradient, hessian, codes, self.levels)

    def refit(
        self, codes: Tensor, gradient: Tensor, hessian: Tensor, precision: Precision
    ) -> tuple[Tensor, "NonuniformGrid", Tensor]:
        """As ``Grid.refit``. With the one-hot codes P of a row, A = P^T H P and b = P^T H e^T.

        A level without codes stays where it is. New levels are sorted again, and the codes follow them."""
        old, index = self.levels.double(), codes.long()
        normal = kernels.level_gram(hessian, codes, old.shape[1])
        slope = sum_by_code(gradient, index, old.shape[1]).double()
        levels = round_levels((old - solve_ridged(normal, slope, _RIDGE)).float(), precision.dtype)
        change = objective_change(levels.double() - old, normal, slope)
        return *_sorted(levels, codes), change

    @property
    def parameters(self) -> Float[Tensor, "rows levels"]:
        return self.levels

    def dequantize_at(self, parameters: Tensor, codes: Tensor, precision: Precision) -> Tensor:
        return round_levels(parameters, precision.dtype).gather(1, codes.long())

    def parameter_gradient(self, codes: Tensor, gradient: Tensor) -> Tensor:
        return sum_by_code(gradient, codes.long(), self.levels.shape[1])

    def spacing(self, codes: Tensor) -> Tensor:
        last = self.levels.shape[1] - 1
        index = torch.arange(last + 1, device=codes.device)
        above, below = (index + 1).clamp(max=last), (index - 1).clamp(min=0)
        steps = (self.levels[:, above] - self.levels[:, below]) / (above - below)
        return steps.gather(1, codes.long())

    def with_tuned(self, parameters: Tensor, codes: Tensor, precision: Precision) -> tuple[Tensor, "NonuniformGrid"]:
        return _sorted(round_levels(parameters, precision.dtype), codes)


def sum_by_code(
    values: Float[Tensor, "rows cols"], codes: Int[Tensor, "rows cols"], count: int
) -> Float[Tensor, "rows count"]:
    """The sum of ``values`` over the columns of each of ``count`` codes, row by row, with the same bits every time."""
    if values.is_cuda:  # where scatter_add_ adds in no fixed order
        return sum_code_by_code(values, codes, count)
    return values.new_zeros(len(values), count).scatter_add_(1, codes, values)


def sum_code_by_code(
    values: Float[Tensor, "rows cols"], codes: Int[Tensor, "rows cols"], count: int
) -> Float[Tensor, "rows count"]:
    """The same by one masked sum a code, which has an order on every device."""
    return torch.stack([values.masked_fill(codes != code, 0).sum(1) for code in range(count)], 1)


def _sorted(levels: Tensor, codes: Tensor) -> tuple[Tensor, NonuniformGrid]:
    """Levels in ascending order, and codes that stand for the same weights."""
    levels, order = levels.sort(dim=1, stable=True)
    rank = torch.argsort(order, dim=1)  # rank[old code] = new code
    return rank.gather(1, codes.long()).to(torch.uint8), NonuniformGrid(levels)


def round_levels(levels: Float[Tensor, "rows levels"], dtype: torch.dtype) -> Float[Tensor, "rows levels"]:
    """``levels``, in any order, rounded to ``dtype`` inside its finite range, as float32."""
    info = torch.finfo(dtype)
    return levels.clamp(info.min, info.max).to(dtype).float()


def fit_nonuniform(
    weight: Float[Tensor, "rows cols"],
    loss_error_weights: Float[Tensor, " cols"] | Float[Tensor, "rows cols"],
    levels: int = 16,
    search: Literal["optimal", "lloyd"] = "optimal",
) -> NonuniformGrid:
    """Return the grid of the least weighted squared error (LeanQuant section 3.1).

    Args:
        weight: any float dtype, [rows, cols].
        loss_error_weights: g, float and at least 0, in original column order: [cols] for all rows, or [rows, cols].
        levels: how many levels a row has: a power of two, at most 256.
        search: "optimal" for the global optimum, "lloyd" for Lloyd's algorithm.

    Raises:
        ShapeError: weights that are not finite, or a number of levels that is no power of two.

    Example:
        >>> import torch
        >>> from leangrid.grids import fit_nonuniform
        >>> weight = torch.tensor([[-1.0, 0.0, 0.1, 4.0, 9.0]])
        >>> grid = fit_nonuniform(weight, torch.ones(5), levels=4)
        >>> grid.levels
        tensor([[-1.0000,  0.0500,  4.0000,  9.0000]])
        >>> grid.nearest(weight)
        tensor([[0, 1, 1, 2, 3]], dtype=torch.uint8)
    """
    weight, importance = check_weight(weight), loss_error_weights.double().contiguous()
    fit = kernels.kmeans_dp if search == "optimal" else kernels.kmeans_lloyd
    return NonuniformGrid(fit(weight, importance, levels)[0])

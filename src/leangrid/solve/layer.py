"""One linear layer, whole: fit the grid, sweep, guard, refine, and judge the result beside the baselines.

Losses are tr(E H E^T)/2 with E = W^ - target and the undamped H; min-max GPTQ and rounding are measured on the same
target, Hessian, bits and groups. Whatever the grid, the result is never worse than rounding without a record.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from time import perf_counter

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from leangrid.block_types import BLOCK_TYPES
from leangrid.errors import ShapeError
from leangrid.grids import (
    Grid,
    GroupedGrid,
    NonuniformGrid,
    Precision,
    fit_affine,
    fit_minmax,
    fit_nonuniform,
    fit_offset,
    fit_superblock,
    minmax_offset,
    minmax_superblock,
)
from leangrid.grids.base import check_weight
from leangrid.machine import flops
from leangrid.recipe import Recipe, Scheme
from leangrid.solve.exact import exact_sweep
from leangrid.solve.factor import Factor, factorize, relative_power
from leangrid.solve.refine import refine
from leangrid.solve.rescue import Rescue
from leangrid.solve.sweep import Swept, sweep

GUARD_POWERS = (2.0, 0.0)  # what a collapsed row tries, where the recipe's p is higher
HALF = Precision(torch.float16)  # in which every block type of llama.cpp keeps its scales
GUARD_GAIN = 0.75  # an alternative must be this far below the learned grid: the lowest loss as a rule made models worse


@dataclass(frozen=True, eq=False)
class LinearResult:
    """A quantized layer: ``codes`` uint8 [rows, cols], its ``grid``, losses against the target, and what was rescued.

    ``seconds`` holds grid, solve, refine, and baseline (what the two comparisons cost); ``flops`` what was done for the
    last three."""

    codes: UInt8[Tensor, "rows cols"]
    grid: Grid
    loss: float
    loss_minmax: float
    loss_rounding: float
    rescues: tuple[Rescue, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    flops: dict[str, float] = field(default_factory=dict)

    def to(self, device: torch.device | str) -> "LinearResult":
        """The same with codes and grid on ``device``."""
        return replace(self, codes=self.codes.to(device), grid=self.grid.to(device))


def minmax_grid(weight: Float[Tensor, "rows cols"], scheme: Scheme, precision: Precision) -> GroupedGrid:
    """The baselines' grid, as the scheme stores one; for a non-uniform scheme the affine one of whole rows."""
    if scheme.grid == "superblock":
        return minmax_superblock(weight, BLOCK_TYPES[scheme.block or ""])
    if scheme.grid == "offset":
        return minmax_offset(weight, scheme.bits, scheme.group_size, precision.dtype).clamped(precision)
    return fit_minmax(weight, scheme.bits, scheme.group_size, scheme.symmetric, precision.dtype).clamped(precision)


def row_losses(
    weight_hat: Float[Tensor, "rows cols"], target: Float[Tensor, "rows cols"], matrix: Float[Tensor, "cols cols"]
) -> Float[Tensor, " rows"]:
    """(E H E^T)_ii / 2 of each row, float64."""
    error = weight_hat.float() - target.float()
    return (error @ matrix).mul_(error).sum(1).double() / 2


def loss(
    weight_hat: Float[Tensor, "rows cols"], target: Float[Tensor, "rows cols"], matrix: Float[Tensor, "cols cols"]
) -> float:
    """The layer loss tr(E H E^T)/2."""
    return float(row_losses(weight_hat, target, matrix).sum())


def solve_linear(
    target: Float[Tensor, "rows cols"],
    factor: Factor,
    matrix: Float[Tensor, "cols cols"],
    recipe: Recipe,
    dtype: torch.dtype | Precision = torch.float32,
) -> LinearResult:
    """Quantize ``target`` by a resolved recipe.

    Args:
        target: the weights, or the corrected target; any float dtype.
        factor: of ``matrix``; its damped matrix guides the refinement.
        matrix: H undamped, float32, original column order.
        recipe: with every default written out (Recipe.resolved).
        dtype: what the container keeps; scales and levels are rounded to it before any error is propagated.

    Raises:
        ShapeError: NaN or infinite weights, or a group size that does not divide the columns.
    """
    return _Layer(check_weight(target), factor, matrix, recipe, Precision.of(dtype)).solve()


def quantize_linear(
    weight: Tensor, hessian: Tensor, scheme: str = "NU3", **recipe_fields: object
) -> tuple[UInt8[Tensor, "rows cols"], Grid, float]:
    """Tensors in, tensors out: quantize ``weight`` [rows, cols] for the Hessian 2/N X^T X [cols, cols].

    Args:
        scheme: such as NU3, W4A16_G64, GPTQ4, RTN4 (see Scheme).
        recipe_fields: any field of Recipe: p, steps, refine, guard, damping, act_order, search.

    Returns:
        codes (uint8 [rows, cols]), grid, and the layer loss tr(E H E^T)/2. ``grid.dequantize(codes)`` is the weight;
        scales and levels are exact in the dtype of ``weight``.

    Raises:
        RecipeError: a field that is wrong. ShapeError: shapes that do not fit, or weights that are not finite.
        NumericalError: a Hessian that is not finite.
    """
    recipe = Recipe.build(scheme=scheme, **recipe_fields).resolved("W4A16")
    if weight.ndim != 2 or tuple(hessian.shape) != (weight.shape[1], weight.shape[1]):
        raise ShapeError(
            f"a weight {tuple(weight.shape)} and a Hessian {tuple(hessian.shape)} do not fit", "quantize_linear"
        )
    factor = factorize(hessian, recipe.damping, recipe.act_order)
    dtype = weight.dtype if weight.dtype in (torch.float16, torch.bfloat16) else torch.float32
    result = solve_linear(weight, factor, hessian.float(), recipe, dtype)
    return result.codes, result.grid, result.loss


class _Layer:
    """The arguments of one solve, so that its steps read as steps."""

    def __init__(self, target: Tensor, factor: Factor, matrix: Tensor, recipe: Recipe, precision: Precision) -> None:
        self.target, self.factor, self.matrix, self.recipe = target, factor, matrix, recipe
        self.scheme = recipe.scheme_for(target.shape[1])
        self.precision = HALF if self.scheme.block else precision
        self.dtype = self.precision.dtype
        self.rescues: list[Rescue] = []
        self.seconds: dict[str, float] = {"grid": 0.0, "solve": 0.0, "refine": 0.0, "baseline": 0.0}
        self.flops: dict[str, float] = {"solve": 0.0, "refine": 0.0, "baseline": 0.0}

    def solve(self) -> LinearResult:
        minmax = self.minmax()
        with self.timed("baseline"):
            rounding = minmax.nearest(self.target)
            loss_rounding = self.loss(rounding, minmax)
        baseline = self.swept(minmax, "solve" if self.scheme.method == "gptq" else "baseline")
        with self.timed("baseline"):
            loss_minmax = self.undamped(baseline.loss, baseline.codes, minmax)
        if self.scheme.method == "rtn":
            codes, grid, value = rounding, minmax, loss_rounding
        elif self.scheme.method == "gptq":
            codes, grid, value = self.refined(baseline, minmax)
        else:
            codes, grid, value = self.refined(*self.learned(baseline, minmax))
        if not value <= loss_rounding and self.scheme.method != "rtn":  # also where it is NaN
            codes, grid, value = self.rounding_instead(codes, grid, value, rounding, minmax, loss_rounding)
        return LinearResult(
            codes, grid, value, loss_minmax, loss_rounding, tuple(self.rescues), self.seconds, self.flops
        )

    def learned(self, baseline: Swept, minmax: GroupedGrid) -> tuple[Swept, Grid]:
        """The loss-error-aware grid and the sweep onto it; rows that fell behind min-max GPTQ may take a lower p or the
        min-max grid."""
        power = self.recipe.p if self.recipe.p is not None else 4.0
        grid = self.fitted(self.target, power)
        swept = self.swept(grid, "solve")
        if not self.recipe.guard:
            return swept, grid
        codes, loss_now = swept.codes, swept.loss.clone()
        behind = (loss_now > baseline.loss).nonzero().squeeze(1)
        if not len(behind):
            return swept, grid
        weight, changed = self.target[behind], torch.zeros_like(loss_now, dtype=torch.bool)
        for other in [*(p for p in GUARD_POWERS if p < power), None]:
            candidate = self.as_kind(minmax.take(behind)) if other is None else self.fitted(weight, other)
            result = self.swept(candidate, "solve", weight)
            better = (result.loss < loss_now[behind]) & (result.loss < GUARD_GAIN * swept.loss[behind])
            rows = behind[better]
            codes[rows], loss_now[rows], changed[rows] = result.codes[better], result.loss[better], True
            grid = grid.put(rows, candidate.take(better))
        if bool(changed.any()):
            count = int(changed.sum())
            detail = f"{count} of {len(codes)} rows fell behind min-max GPTQ at p = {power:g} and took another grid"
            self.rescues.append(Rescue("guarded_rows", detail, count))
        return Swept(codes, loss_now), grid

    def rounding_instead(
        self, codes: Tensor, grid: Grid, value: float, rounding: Tensor, minmax: GroupedGrid, loss_rounding: float
    ) -> tuple[Tensor, Grid, float]:
        """The best result without error propagation, in the same format, and the record of it."""
        self.rescues.append(Rescue("worse_than_rounding", f"loss {value:.6g} against {loss_rounding:.6g} for rounding"))
        if self.scheme.grid != "nonuniform":
            return rounding, minmax, loss_rounding
        for candidate in (self.as_kind(minmax), self.fitted(self.target, 0.0)):
            nearest = candidate.nearest(self.target)
            loss_nearest = self.loss(nearest, candidate)
            if loss_nearest < value:
                codes, grid, value = nearest, candidate, loss_nearest
        return codes, grid, value

    def fitted(self, weight: Tensor, power: float) -> Grid:
        """The learned grid of the scheme for some rows, exact in the stored dtype."""
        with self.timed("grid"):
            if self.scheme.exact:  # Algorithm 2 has no elimination order yet: the unconditional diagonal
                weights = relative_power(self.factor.inverse().diagonal().sqrt(), power)
            else:
                weights = self.factor.loss_error_weights(power)
            if self.scheme.grid == "nonuniform":
                return fit_nonuniform(weight, weights, self.scheme.levels, self.recipe.search).rounded(self.dtype)
            bits, group_size, symmetric = self.scheme.bits, self.scheme.group_size, self.scheme.symmetric
            if self.scheme.grid == "superblock":
                return fit_superblock(weight, weights, BLOCK_TYPES[self.scheme.block or ""], self.recipe.steps)
            if self.scheme.grid == "offset":
                return fit_offset(weight, weights, bits, self.recipe.steps, group_size, self.dtype).clamped(
                    self.precision
                )
            found = fit_affine(weight, weights, bits, self.recipe.steps, group_size, symmetric, self.dtype)
            return found.clamped(self.precision)

    def minmax(self) -> GroupedGrid:
        with self.timed("baseline"):
            return minmax_grid(self.target, self.scheme, self.precision)

    def as_kind(self, minmax: GroupedGrid) -> Grid:
        """A min-max grid in the scheme's own format (whole rows, where that is non-uniform)."""
        if self.scheme.grid != "nonuniform":
            return minmax
        return NonuniformGrid(minmax.levels[:, 0].contiguous()).rounded(self.dtype)

    def swept(self, grid: Grid, stage: str, weight: Tensor | None = None) -> Swept:
        exact = self.scheme.exact and stage == "solve"
        solver, count = (exact_sweep, flops.exact) if exact else (sweep, flops.sweep)
        weight = self.target if weight is None else weight
        self.flops[stage] += count(weight.shape[0], weight.shape[1])
        with self.timed(stage):
            return solver(weight, self.factor, grid)

    def refined(self, swept: Swept, grid: Grid) -> tuple[Tensor, Grid, float]:
        """The refined codes and grid, and their loss."""
        with self.timed("refine"):
            if not self.recipe.refine:
                return swept.codes, grid, self.undamped(swept.loss, swept.codes, grid)
            self.flops["refine"] += flops.refine(self.target.shape[0], self.target.shape[1], self.recipe.refine)
            result = refine(self.target, swept.codes, grid, self.factor.damped, self.recipe.refine, self.precision)
            return result.codes, result.grid, self.undamped(result.loss, result.codes, result.grid)

    def undamped(self, damped: Tensor, codes: Tensor, grid: Grid) -> float:
        """The layer loss from the rows' losses under H + lambda I, which the solver knows: less lambda |E|^2 / 2, no
        product with H."""
        if self.factor.is_diagonal:
            return self.loss(codes, grid)
        error = grid.dequantize(codes).sub_(self.target)
        return float(
            (damped - torch.linalg.vector_norm(error, dim=1).double().square() * (self.factor.ridge / 2)).sum()
        )

    def loss(self, codes: Tensor, grid: Grid) -> float:
        self.flops["baseline"] += flops.layer_loss(codes.shape[0], codes.shape[1])
        return loss(grid.dequantize(codes), self.target, self.matrix)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        self._wait()
        start = perf_counter()
        yield
        self._wait()
        self.seconds[stage] += perf_counter() - start

    def _wait(self) -> None:
        """A device works on while Python goes ahead: a stage's time ends when its work does."""
        if self.target.is_cuda:
            torch.cuda.synchronize(self.target.device)

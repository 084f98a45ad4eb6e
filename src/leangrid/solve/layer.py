"""One linear layer: fit a grid, sweep the weights onto it, refine both, and compare the result with the baselines.

The loss of a layer is tr(E H E^T) / 2 with E = W^ - target and the undamped H. The baselines, rounding and GPTQ on a
min-max grid, have the same target, Hessian, bits and groups. A result that is worse than rounding is replaced, and that
is recorded as a Rescue."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from leangrid.errors import RecipeError, ShapeError
from leangrid.grids import Grid, Precision, grid_class
from leangrid.grids.base import FLOAT32, check_weight
from leangrid.machine.arithmetic import use_products
from leangrid.recipe import Recipe
from leangrid.schemes import GRID_SCHEMES, Scheme
from leangrid.solve.factor import Factor, factorize, relative_power
from leangrid.solve.observer import NoObserver, Observer, Stage
from leangrid.solve.refine import refine
from leangrid.solve.rescue import Rescue
from leangrid.solve.sweep import Swept, exact_sweep, sweep

# A row whose sweep is worse than GPTQ's on the min-max grid tries grids for lower p, then the min-max grid.
GUARD_POWERS = (2.0, 0.0)
# Its loss must fall below this share of what it was: taking every lower loss made whole models worse.
GUARD_GAIN = 0.75


@dataclass(frozen=True, eq=False)
class LinearResult:
    """A quantized linear layer. It unpacks as ``codes, grid, loss``.

    Attributes:
        codes: uint8 [rows, cols], original column order.
        grid: ``grid.dequantize(codes)`` is the quantized weight, float32.
        loss: tr(E H E^T) / 2 of the result.
        loss_minmax: the same of GPTQ on a min-max grid.
        loss_rounding: the same of rounding to that grid.
        rescues: what was done differently from the recipe.

    Example:
        >>> result = leangrid.quantize_linear(torch.eye(4, 8), torch.eye(8), scheme="W4A16")
        >>> codes, grid, loss = result
        >>> result.loss <= result.loss_minmax <= result.loss_rounding
        True
    """

    codes: UInt8[Tensor, "rows cols"]
    grid: Grid
    loss: float
    loss_minmax: float
    loss_rounding: float
    rescues: tuple[Rescue, ...] = ()

    def __iter__(self) -> Iterator[Any]:
        """``codes``, ``grid`` and ``loss``, in this order."""
        return iter((self.codes, self.grid, self.loss))

    def __getitem__(self, index: int) -> Any:
        """``result[0]`` is the codes, ``[1]`` the grid, ``[2]`` the loss."""
        return (self.codes, self.grid, self.loss)[index]

    def __len__(self) -> int:
        """3: what it unpacks into."""
        return 3

    def to(self, device: torch.device | str) -> "LinearResult":
        """The same with codes and grid on ``device``."""
        return replace(self, codes=self.codes.to(device), grid=self.grid.to(device))


def quantize_linear(
    weight: Tensor, hessian: Tensor, scheme: str | Scheme = "NU3", **recipe_fields: object
) -> LinearResult:
    """Quantize one weight for a given Hessian: tensors in, tensors out.

    Args:
        weight: [rows, cols], any float dtype; y = weight @ x.
        hessian: 2/N X^T X [cols, cols], any float dtype, with one calibration token in each of the N rows of X.
        scheme: a string such as NU3, W4A16_G64, GPTQ4 or RTN4, or a ``Scheme`` that such a string names.
        recipe_fields: other fields of ``Recipe``: p, steps, refine, guard, damping, act_order, search.

    Returns:
        A LinearResult. Scales and levels of its grid are exact in the dtype of ``weight`` if that is float16 or
        bfloat16, else in float32.

    Raises:
        RecipeError: a wrong field, or a ``Scheme`` that no scheme string names.
        ShapeError: shapes that do not fit, or weights that are not finite.
        NumericalError: a Hessian that is not finite.

    Example:
        >>> import torch, leangrid
        >>> weight, inputs = torch.eye(4, 8), torch.eye(8)
        >>> codes, grid, loss = leangrid.quantize_linear(weight, inputs.T @ inputs, scheme="NU2")
        >>> codes.shape, codes.dtype
        (torch.Size([4, 8]), torch.uint8)
        >>> torch.equal(grid.dequantize(codes), weight)
        True
    """
    recipe = _recipe_of(scheme, recipe_fields)
    if weight.ndim != 2 or tuple(hessian.shape) != (weight.shape[1], weight.shape[1]):
        raise ShapeError(
            f"a weight {tuple(weight.shape)} and a Hessian {tuple(hessian.shape)} do not fit", "quantize_linear"
        )
    factor = factorize(hessian, recipe.damping, recipe.act_order)
    precision = Precision(weight.dtype if weight.dtype in (torch.float16, torch.bfloat16) else torch.float32)
    return solve_linear(weight, factor, hessian.float(), recipe, precision)


def _recipe_of(scheme: str | Scheme, fields: dict[str, Any]) -> Recipe:
    """The resolved recipe of a scheme; a grid of scale and stored offset comes from a container that holds such."""
    if isinstance(scheme, str):
        return Recipe(scheme=scheme, **fields).resolved("W4A16")
    recipe = Recipe(**{"scheme": scheme.name, "format": GRID_SCHEMES[scheme.grid].format, **fields}).resolved()
    if recipe.parsed != scheme:
        what = f"no scheme string names {scheme!r}"
        raise RecipeError(what, "quantize_linear", f"'{scheme.name}' means {recipe.parsed!r}")
    return recipe


@use_products("float32")
def solve_linear(
    target: Float[Tensor, "rows cols"],
    factor: Factor,
    hessian: Float[Tensor, "cols cols"],
    recipe: Recipe,
    precision: Precision = FLOAT32,
    observer: Observer | None = None,
) -> LinearResult:
    """Quantize ``target``: LeanQuant's Algorithm 1 for one linear, whose Hessian is factored already.

    Args:
        target: the weights, or the corrected target (solve/correction.py); any float dtype.
        factor: of ``hessian``.
        hessian: H undamped, float32, original column order.
        recipe: with every default written out (Recipe.resolved).
        precision: of the container; scales, offsets and levels are rounded to it before any error is moved.
        observer: is told of the stages; None for nobody.

    Raises:
        RecipeError: a recipe that is not resolved.
        ShapeError: weights that are not finite, or a group size that does not divide the columns.
    """
    target = check_weight(target)
    scheme = recipe.scheme_for(target.shape[1])
    precision = precision.for_scheme(scheme)
    return _Layer(target, factor, hessian, recipe, scheme, precision, observer or NoObserver()).solve()


def layer_loss(
    weight_hat: Float[Tensor, "rows cols"], target: Float[Tensor, "rows cols"], hessian: Float[Tensor, "cols cols"]
) -> float:
    """The layer loss tr(E H E^T) / 2, E = ``weight_hat`` - ``target``; summed over the rows in float64."""
    error = weight_hat.float() - target.float()
    return float(((error @ hessian).mul_(error).sum(1).double() / 2).sum())


@dataclass(frozen=True, eq=False)
class _Quantized:
    """Codes on a grid, and the loss of the layer."""

    codes: Tensor
    grid: Grid
    loss: float


@dataclass(frozen=True, eq=False)
class _Layer:
    """The arguments of one ``solve_linear``, shared by its steps."""

    target: Tensor
    factor: Factor
    hessian: Tensor
    recipe: Recipe
    scheme: Scheme
    precision: Precision
    observer: Observer
    rescues: list[Rescue] = field(default_factory=list)

    def solve(self) -> LinearResult:
        method, power = self.scheme.method, self.recipe.exponent
        # The baselines: round to the min-max grid; GPTQ, the sweep onto the min-max grid.
        with self.observer.stage("baseline"):
            minmax = grid_class(self.scheme).fit_minmax(self.target, self.scheme, self.precision)
        rounding = self.round_to(minmax)
        gptq = self.sweep_onto(minmax, self.target, "solve" if method == "gptq" else "baseline")
        loss_minmax = self.undamped_loss(gptq.loss, gptq.codes, minmax, "baseline")
        if method == "rtn":
            result = rounding
        elif method == "gptq":
            result = self.refine(gptq, minmax)
        else:
            # Step 1: the grid that minimises the error weighted by U_jj^-p.
            grid = self.fit_grid(self.target, power)
            # Step 2: quantize column by column, each error moved to the columns that follow.
            swept = self.sweep_onto(grid, self.target, "solve")
            # Step 3: rows that are worse than GPTQ take another grid.
            if self.recipe.guard:
                swept, grid = self.guard_rows(swept, grid, power, gptq, minmax)
            # Step 4: refit the grid to the codes and move the codes, in turns.
            result = self.refine(swept, grid)
        # Step 5: a result worse than rounding (or NaN) is replaced.
        if not result.loss <= rounding.loss and method != "rtn":
            result = self.round_instead(result, rounding, minmax)
        return LinearResult(
            result.codes, result.grid, result.loss, loss_minmax, rounding.loss, rescues=tuple(self.rescues)
        )

    def fit_grid(self, weight: Tensor, power: float) -> Grid:
        """The learned grid of some rows for p = ``power``, exact in the stored dtype."""
        with self.observer.stage("grid"):
            if self.scheme.exact:  # Algorithm 2 has no elimination order before it begins: the diagonal of H^-1
                weights = relative_power(self.factor.inverse().diagonal().sqrt(), power)
            else:
                weights = self.factor.loss_error_weights(power)
            return grid_class(self.scheme).fit(weight, weights, self.scheme, self.recipe, self.precision)

    def sweep_onto(self, grid: Grid, weight: Tensor, stage: Stage) -> Swept:
        """Algorithm 1, or Algorithm 2 where the scheme asks for it (the baselines are always swept)."""
        exact = self.scheme.exact and stage == "solve"
        self.observer.record_sweep(stage, *weight.shape, exact=exact)
        with self.observer.stage(stage):
            return (exact_sweep if exact else sweep)(weight, self.factor, grid)

    def guard_rows(self, swept: Swept, grid: Grid, power: float, gptq: Swept, minmax: Grid) -> tuple[Swept, Grid]:
        """The sweep and its grid, with other grids for rows whose loss is above GPTQ's: lower p, or the min-max grid.

        A high p makes the grid fit a few columns; a row whose other columns need other levels may lose by it."""
        codes, loss_now = swept.codes, swept.loss.clone()
        behind = (loss_now > gptq.loss).nonzero().squeeze(1)
        if not len(behind):
            return swept, grid
        weight, changed = self.target[behind], torch.zeros_like(loss_now, dtype=torch.bool)
        kind = grid_class(self.scheme)
        for lower in [*(p for p in GUARD_POWERS if p < power), None]:
            if lower is None:
                candidate = kind.from_minmax(minmax.select_rows(behind), self.precision)
            else:
                candidate = self.fit_grid(weight, lower)
            tried = self.sweep_onto(candidate, weight, "solve")
            better = (tried.loss < loss_now[behind]) & (tried.loss < GUARD_GAIN * swept.loss[behind])
            rows = behind[better]
            codes[rows], loss_now[rows], changed[rows] = tried.codes[better], tried.loss[better], True
            grid = grid.replace_rows(rows, candidate.select_rows(better))
        if bool(changed.any()):
            count = int(changed.sum())
            detail = f"{count} of {len(codes)} rows fell behind min-max GPTQ at p = {power:g} and took another grid"
            self.rescues.append(Rescue("guarded_rows", detail, count))
        return Swept(codes, loss_now), grid

    def refine(self, swept: Swept, grid: Grid) -> _Quantized:
        """Codes and grid after the recipe's rounds of refinement (none: as they were swept)."""
        if not self.recipe.refine:
            return _Quantized(swept.codes, grid, self.undamped_loss(swept.loss, swept.codes, grid, "refine"))
        rows, cols = self.target.shape
        self.observer.record_refinement("refine", rows, cols, self.recipe.refine)
        with self.observer.stage("refine"):
            result = refine(self.target, swept.codes, grid, self.factor.damped, self.recipe.refine, self.precision)
        return _Quantized(
            result.codes, result.grid, self.undamped_loss(result.loss, result.codes, result.grid, "refine")
        )

    def round_instead(self, result: _Quantized, rounding: _Quantized, minmax: Grid) -> _Quantized:
        """The best result without a sweep, on a grid of the scheme's kind; recorded."""
        self.rescues.append(
            Rescue("worse_than_rounding", f"loss {result.loss:.6g} against {rounding.loss:.6g} for rounding")
        )
        own = grid_class(self.scheme).from_minmax(minmax, self.precision)
        if own is minmax:
            return rounding
        for candidate in (own, self.fit_grid(self.target, 0.0)):
            rounded = self.round_to(candidate)
            if rounded.loss < result.loss:
                result = rounded
        return result

    def round_to(self, grid: Grid) -> _Quantized:
        """Each weight on its nearest level."""
        with self.observer.stage("baseline"):
            codes = grid.nearest(self.target)
        return _Quantized(codes, grid, self.measure_loss(codes, grid))

    def measure_loss(self, codes: Tensor, grid: Grid) -> float:
        """The layer loss, by a product with H."""
        self.observer.record_loss("baseline", *codes.shape)
        with self.observer.stage("baseline"):
            return layer_loss(grid.dequantize(codes), self.target, self.hessian)

    def undamped_loss(self, damped: Tensor, codes: Tensor, grid: Grid, stage: Stage) -> float:
        """The layer loss from that of each row under H + lambda I: lambda |e|^2 / 2 less, without a product with H."""
        if self.factor.is_diagonal:  # then the rows' losses are not under H + lambda I
            return self.measure_loss(codes, grid)
        with self.observer.stage(stage):
            error = grid.dequantize(codes).sub_(self.target)
            squares = torch.linalg.vector_norm(error, dim=1).double().square()
            return float((damped - squares * (self.factor.ridge / 2)).sum())

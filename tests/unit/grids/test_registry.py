"""The registry of grids: each row offers what the package calls, and a new grid is one class and one row."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from math_problems import hessian, inputs, layer, losses, weight
from torch import Tensor

from leangrid import kernels
from leangrid.errors import RecipeError
from leangrid.grids import KINDS, AffineGrid, GroupedGrid, Precision, grid_class
from leangrid.grids.affine import round_scale, same_sign
from leangrid.recipe import Recipe
from leangrid.schemes import GRID_SCHEMES, GridScheme, Scheme
from leangrid.solve.factor import factorize
from leangrid.solve.in_place import concatenate_results
from leangrid.solve.layer import LinearResult, quantize_linear, solve_linear

SCHEMES = {"affine": "W4A16_G64", "nonuniform": "NU4", "offset": "Q4_1", "superblock": "Q4_K"}


@dataclass(frozen=True, eq=False)
class PowerGrid(GroupedGrid):
    """The new grid: levels -1, -1/2, -1/4, ... and 1, 1/2, 1/4, ... times a scale for each row, which is learned."""

    scale: Tensor
    bits: int
    group_size: int | None = None

    FIT_SECONDS_PER_WEIGHT: ClassVar[float] = 1e-8

    @classmethod
    def fit(
        cls, weight: Tensor, loss_error_weights: Tensor, scheme: Scheme, recipe: Recipe, precision: Precision
    ) -> "PowerGrid":
        best = cls.fit_minmax(weight, scheme, precision)
        least = torch.full_like(best.scale, torch.inf)
        for share in torch.linspace(0.3, 1.2, 37):
            tried = replace(best, scale=weight.abs().amax(1, keepdim=True) * share).rounded(precision.dtype)
            error = tried.dequantize(tried.nearest(weight)).sub_(weight).square_()
            error = (error * loss_error_weights).sum(1, keepdim=True).float()
            best = replace(best, scale=torch.where(error < least, tried.scale, best.scale))
            least = torch.minimum(error, least)
        return best

    @classmethod
    def fit_minmax(cls, weight: Tensor, scheme: Scheme, precision: Precision) -> "PowerGrid":
        return cls(weight.abs().amax(1, keepdim=True).float(), scheme.bits).rounded(precision.dtype)

    @classmethod
    def describe(cls, scheme: Scheme) -> str:
        return f"{scheme.levels} powers of two times a scale"

    @property
    def shape(self) -> Tensor:
        powers = 0.5 ** torch.arange(2 ** (self.bits - 1), device=self.scale.device)
        return torch.cat((-powers, powers.flip(0)))

    @property
    def levels(self) -> Tensor:
        return (self.scale * self.shape)[:, None]

    def dequantize(self, codes: Tensor) -> Tensor:
        return self.scale * self.shape[codes.long()]

    def nearest(self, weight: Tensor) -> Tensor:
        levels = self.levels[:, 0]
        return torch.searchsorted(0.5 * (levels[:, :-1] + levels[:, 1:]), weight.contiguous()).to(torch.uint8)

    def rounded(self, dtype: torch.dtype) -> "PowerGrid":
        return replace(self, scale=round_scale(self.scale, dtype))

    @property
    def parameters(self) -> Tensor:
        return self.scale[..., None]

    def design(self, codes: Tensor) -> Tensor:
        return self.shape[codes.long()][:, None]

    def with_parameters(self, parameters: Tensor, dtype: torch.dtype) -> "PowerGrid":
        return replace(self, scale=round_scale(same_sign(parameters[..., 0], self.scale), dtype))

    def sweep_block(self, weight: Tensor, upper: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.sweep_levels(weight, upper, self.levels[:, 0])

    def sweep_exact(self, weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.exact_levels(weight, inverse, self.levels[:, 0])

    def descend_block(self, gradient: Tensor, hessian: Tensor, codes: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.descend_levels(gradient, hessian, codes, self.levels[:, 0])


@pytest.fixture
def _powers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The new grid's rows."""
    monkeypatch.setitem(KINDS, "powers of two", PowerGrid)
    row = GridScheme("POW{bits}", (3,), p=1.0, format="lut", title="power", has_groups=False)
    monkeypatch.setitem(GRID_SCHEMES, "powers of two", row)


def check(result: LinearResult, w: Tensor, matrix: Tensor) -> None:
    """The result is on the new grid, its loss is what it says, and it is not worse than rounding."""
    again = result.grid.dequantize(result.codes)
    assert isinstance(result.grid, PowerGrid)
    assert result.loss == pytest.approx(float(losses(again, w, matrix).sum()), rel=1e-3)
    assert result.loss <= result.loss_rounding


@pytest.mark.usefixtures("_powers")
def test_a_new_grid_goes_the_whole_way() -> None:
    w, matrix = weight(40, 64), hessian(64)
    recipe = Recipe(scheme="pow3").resolved()
    assert (recipe.scheme, recipe.p, recipe.format, recipe.parsed.grid) == ("POW3", 1.0, "lut", "powers of two")
    assert Scheme.parse(recipe.parsed.name) == recipe.parsed
    for wrong in ("POW4", "POW3_G16"):
        with pytest.raises(RecipeError, match=wrong):
            Scheme.parse(wrong)
    learned, swept = (quantize_linear(w, matrix, "POW3", refine=rounds) for rounds in (1, 0))
    for result in (learned, swept):
        check(result, w, matrix)
    assert learned.loss < swept.loss < swept.loss_minmax < swept.loss_rounding
    exact = quantize_linear(w[:4], matrix, "POW3_EXACT")
    check(exact, w[:4], matrix)
    half = quantize_linear(w.bfloat16(), matrix, "POW3").grid
    assert torch.equal(half.rounded(torch.bfloat16).levels, half.levels)


@pytest.mark.usefixtures("_powers")
def test_a_new_grid_is_guarded_and_replaced_by_rounding() -> None:
    # A row with outliers on two inputs that nearly agree: a high p fits one of them alone.
    random = torch.Generator().manual_seed(0)
    x = inputs(400, 64)
    x[:, 0] = torch.randn(400, generator=random) * 20
    x[:, 1] = x[:, 0] + 0.03 * torch.randn(400, generator=random)
    w, matrix = weight(16, 64), 2 / 400 * x.T @ x
    w[3, :2] = torch.tensor([1.0, -0.6])
    guarded = quantize_linear(w, matrix, "POW3", damping=1e-4, p=16, refine=0)
    assert "guarded_rows" in {rescue.kind for rescue in guarded.rescues}
    check(guarded, w, matrix)
    # Hessians on which a sweep loses against rounding.
    kinds = []
    for seed in range(60):
        random = torch.Generator().manual_seed(seed)
        basis = torch.linalg.qr(torch.randn(6, 6, generator=random)).Q
        matrix, w = (basis * torch.logspace(0, -3, 6)) @ basis.T, torch.randn(2, 6, generator=random)
        matrix = (matrix + matrix.T) / 2
        result = quantize_linear(w, matrix, "POW3", refine=0, guard=False)
        check(result, w, matrix)
        kinds += [rescue.kind for rescue in result.rescues]
    assert "worse_than_rounding" in kinds


@pytest.mark.usefixtures("_powers")
def test_a_new_grid_is_solved_in_tiles_of_rows() -> None:
    w, matrix, factor = layer(20, 32)
    recipe = Recipe(scheme="POW3").resolved()
    whole, *tiles = (solve_linear(rows, factor, matrix, recipe) for rows in (w, *w.split(7)))
    joined = concatenate_results(tiles)
    assert torch.equal(joined.codes, whole.codes)
    torch.testing.assert_close(joined.grid.levels, whole.grid.levels)


@pytest.mark.parametrize("name", KINDS)
def test_every_row_offers_what_is_asked_of_it(name: str) -> None:
    scheme, w = Scheme.parse(SCHEMES[name]), weight(6, 256)
    kind, precision = grid_class(scheme), Precision(torch.bfloat16).for_scheme(scheme)
    factor = factorize(hessian(256))
    recipe = Recipe().with_defaults(scheme)
    learned = kind.fit(w, factor.loss_error_weights(2.0), scheme, recipe, precision)
    minmax = kind.fit_minmax(w, scheme, precision)
    own = kind.from_minmax(minmax, precision)
    assert type(learned) is type(own) is kind and learned.bits == scheme.bits
    assert kind.FIT_SECONDS_PER_WEIGHT > 0 and "grid" in kind.describe(scheme)
    if isinstance(learned, GroupedGrid) and issubclass(kind, GroupedGrid):
        assert kind.spans_and_kinds(scheme, 256) == learned.parameters.shape[1:]
    assert 0 < kind.refit_bytes(scheme, 6, 256, False) <= kind.refit_bytes(scheme, 600, 256, True)
    for grid in (learned, own):
        assert torch.equal(grid.rounded(precision.dtype).levels, grid.levels)
        codes = grid.nearest(w)
        assert float((grid.dequantize(codes) - w).norm()) < 0.5 * float(w.norm())


def test_recipes_know_the_kinds_that_are_fitted() -> None:
    assert list(GRID_SCHEMES) == list(KINDS)
    with pytest.raises(RecipeError, match="'powers of two' is no kind of grid"):
        Scheme(grid="powers of two", method="leanquant", bits=3, group_size=None)


def test_a_scheme_is_quantized_as_the_string_that_names_it() -> None:
    w, matrix = weight(4, 32), hessian(32)
    offset = Scheme(grid="offset", method="leanquant", bits=4, group_size=16)
    for scheme in (Scheme.parse("NU3"), Scheme.parse("GPTQ4_G16"), Scheme.parse("Q4_0"), offset):
        result = quantize_linear(w, matrix, scheme)
        assert isinstance(result.grid, AffineGrid if scheme.method == "gptq" else KINDS[scheme.grid])
    with pytest.raises(RecipeError, match="no scheme string names"):
        quantize_linear(w, matrix, Scheme(grid="nonuniform", method="gptq", bits=4, group_size=None))


def test_a_recipe_that_is_not_resolved_is_refused() -> None:
    w, matrix, factor = layer(4, 32)
    for recipe in (Recipe(scheme="NU3"), Recipe(scheme="NU3", p=4)):
        with pytest.raises(RecipeError, match="defaults of the scheme are not written out"):
            solve_linear(w, factor, matrix, recipe)

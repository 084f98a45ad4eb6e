"""Block tuning on tensors: the gradient it moves by, what it leaves, and when it leaves the solved state."""

import math
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from torch import Tensor

from leangrid.grids import Grid, grid_class
from leangrid.grids.base import FLOAT32, Precision
from leangrid.recipe import Recipe
from leangrid.schemes import Scheme
from leangrid.solve.tuning import Error, Steps, TunedLinear, count_held_out, count_step_windows, tune

SCHEMES = ["W4A16", "W3A16_G32", "W4A16_G32_SYM", "NU3", "Q4_K", "Q3_K", "Q4_1"]
COLS = {"Q4_K": 256, "Q3_K": 256}


def _solved(name: str, rows: int = 6, seed: int = 0) -> tuple[Tensor, Grid, Tensor]:
    """Codes, grid and the weight they are of."""
    scheme = Scheme.parse(name)
    cols = COLS.get(name, 64)
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    grid = grid_class(scheme).fit(weight, torch.ones(cols).double(), scheme, Recipe(steps=64), FLOAT32)
    return grid.nearest(weight), grid, weight


@pytest.mark.parametrize("name", SCHEMES)
def test_the_gradient_by_the_parameters_is_that_of_the_dequantized_weights(name: str) -> None:
    codes, grid, _ = _solved(name)
    wanted = torch.randn(codes.shape, generator=torch.Generator().manual_seed(1))
    found = grid.parameter_gradient(codes, wanted).double()
    for place in [(0, 0), (3, 1), (5, -1)]:
        row = grid.parameters[place[0]].flatten()
        step = torch.zeros_like(grid.parameters)
        number = place[1] % row.numel()
        step[place[0]].view(-1)[number] = 2.0**-6 * float(row[number].abs().clamp(min=0.05))
        after = _weights_at(grid, grid.parameters + step, codes)
        before = _weights_at(grid, grid.parameters - step, codes)
        by_hand = float(((after - before) * wanted).sum() / (2 * step.sum()))
        assert math.isclose(by_hand, float(found[place[0]].flatten()[number]), rel_tol=2e-2, abs_tol=2e-2), place


def _weights_at(grid: Grid, parameters: Tensor, codes: Tensor) -> Tensor:
    return grid.dequantize_at(parameters, codes, FLOAT32).double()


@pytest.mark.parametrize("name", SCHEMES)
def test_spacing_is_the_mean_step_beside_a_code(name: str) -> None:
    codes, grid, _ = _solved(name)
    above, below = codes.int().add(1).clamp(max=2**grid.bits - 1), codes.int().sub(1).clamp(min=0)
    step = (grid.dequantize(above) - grid.dequantize(below)) / (above - below)
    torch.testing.assert_close(grid.spacing(codes), step, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", SCHEMES)
def test_codes_and_grid_of_a_state_stand_for_the_weight_it_was_tuned_with(name: str) -> None:
    codes, grid, weight = _solved(name)
    precision = Precision(torch.bfloat16) if name.startswith(("W", "NU")) else Precision(torch.float16)
    one = TunedLinear(codes, grid, weight, precision, Steps(1))
    with torch.no_grad():
        for leaf in one.leaves:
            leaf += 0.8 * leaf.abs().mean() * torch.randn(leaf.shape, generator=torch.Generator().manual_seed(2))
    new, changed = one.state()
    assert torch.equal(changed.dequantize(new), one.weight())
    assert not torch.equal(new, codes)


def test_a_state_that_was_not_moved_is_the_solved_one() -> None:
    codes, grid, weight = _solved("W4A16")
    assert torch.equal(TunedLinear(codes, grid, weight, FLOAT32, Steps(1)).state()[0], codes)


def _two_layers(name: str) -> tuple[dict[str, TunedLinear], Error, Callable[[Mapping[str, Tensor]], Tensor]]:
    """Two linears with a nonlinearity between them: codes that are best for each alone are not best for both."""
    first, second = _solved(name, 64), _solved(name, 32, seed=3)
    tokens = torch.randn(9, 48, 64, generator=torch.Generator().manual_seed(4))
    tokens = tokens @ torch.randn(64, 64, generator=torch.Generator().manual_seed(5)) * 0.2
    wanted = torch.tanh(tokens @ first[2].T * 0.2) @ second[2].T

    def error(batch: int, weights: Mapping[str, Tensor]) -> Tensor:
        given = torch.tanh(tokens[batch] @ weights["first"].T * 0.2) @ weights["second"].T
        return (given - wanted[batch]).square().mean()

    def unseen(weights: Mapping[str, Tensor]) -> Tensor:
        return error(8, weights)

    steps = Steps(12)
    linears = {key: TunedLinear(*one, FLOAT32, steps) for key, one in (("first", first), ("second", second))}
    return linears, error, unseen


@pytest.mark.parametrize("name", ["W4A16", "W3A16_G32", "NU3"])
def test_tuning_lowers_the_error_on_batches_that_it_did_not_see(name: str) -> None:
    linears, error, unseen = _two_layers(name)
    before = float(unseen({key: one.grid.dequantize(one.codes) for key, one in linears.items()}))
    tuning, state = tune(linears, error, range(7), [7], Steps(12))
    after = float(unseen({key: grid.dequantize(codes) for key, (codes, grid) in state.items()}))
    assert after < 0.9 * before
    assert tuning.best > 0
    assert tuning.held_after < tuning.held_before
    assert 0 < tuning.moved < 0.5


def test_tuning_twice_gives_the_same_bits() -> None:
    runs = []
    for _ in range(2):
        linears, error, _ = _two_layers("NU3")
        runs.append(tune(linears, error, range(7), [7], Steps(3)))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(runs[0][1][key][0], runs[1][1][key][0]) for key in ("first", "second"))


def test_the_solved_state_stays_where_held_out_batches_get_worse() -> None:
    linears, error, _ = _two_layers("W4A16")

    def other(batch: int, weights: Mapping[str, Tensor]) -> Tensor:  # what is good for the one is bad for the other
        return error(batch, weights) if batch < 7 else 2 - error(0, weights)

    tuning, state = tune(linears, other, range(7), [7], Steps(12))
    assert (tuning.best, tuning.moved, tuning.held_after) == (0, 0.0, tuning.held_before)
    for key, one in linears.items():
        assert state[key][0] is one.codes
        assert state[key][1] is one.grid


@pytest.mark.parametrize(("passes", "made"), [(2, 2), (4, 3), (12, 6)])
def test_half_of_the_passes_may_gain_nothing_before_tuning_ends(passes: int, made: int) -> None:
    """While steps are large, an error that does not fall yet is no reason to stop."""
    linears, error, _ = _two_layers("W4A16")
    seen: list[int] = []

    def other(batch: int, weights: Mapping[str, Tensor]) -> Tensor:  # what is held out only gets worse
        return error(batch, weights) if batch < 7 else 2 - error(0, weights)

    tune(linears, other, range(7), [7], Steps(passes), watch=lambda turn, held: seen.append(turn))
    assert seen == list(range(1, made + 1))


@pytest.mark.fault("N6")
def test_a_gradient_that_is_not_finite_ends_tuning_with_the_best_state_before_it() -> None:
    linears, error, _ = _two_layers("W4A16")
    calls = [0]

    def breaks(batch: int, weights: Mapping[str, Tensor]) -> Tensor:
        calls[0] += batch < 7 and torch.is_grad_enabled()
        return error(batch, weights) * (math.inf if calls[0] == 16 else 1)

    tuning, state = tune(linears, breaks, range(7), [7], Steps(12))
    assert "not finite in pass 3" in tuning.trouble
    assert tuning.best == 2
    assert tuning.held_after < tuning.held_before
    assert all(bool(grid.dequantize(codes).isfinite().all()) for codes, grid in state.values())


@pytest.mark.parametrize(("value", "words"), [(0.0, "is 0"), (math.nan, "not finite")])
def test_a_block_without_an_error_to_lower_stays_as_it_was_solved(value: float, words: str) -> None:
    linears, error, _ = _two_layers("W4A16")
    tuning, state = tune(linears, lambda batch, weights: error(batch, weights) * value, range(7), [7], Steps(2))
    assert words in tuning.trouble
    assert state["first"][0] is linears["first"].codes


def test_steps_of_several_ranks_are_those_of_one_that_has_all_their_batches() -> None:
    """Two ranks with two and one batches, one after the other in one process: sums are played back."""
    linears, error, _ = _two_layers("W4A16")
    log: list[list[Tensor]] = []
    tune(linears, error, [0, 2], [7], Steps(1), add=lambda tensors: log.append([t.clone() for t in tensors]))
    other, error, _ = _two_layers("W4A16")
    again = iter(log)

    def add(tensors: Sequence[Tensor]) -> None:
        for mine, theirs in zip(tensors, next(again), strict=True):
            mine += theirs

    tuning, _ = tune(other, error, [1], [7], Steps(1), add=add)
    assert tuning.best in (0, 1)
    assert next(again, None) is None, "both ranks exchange equally often"
    assert math.isclose(tuning.held_before, float(error(7, {k: o.grid.dequantize(o.codes) for k, o in other.items()})))


@pytest.mark.parametrize(("batches", "held"), [(1, 0), (3, 0), (4, 1), (15, 1), (16, 2), (128, 16)])
def test_an_eighth_of_the_batches_is_held_out(batches: int, held: int) -> None:
    assert count_held_out(batches) == held


@pytest.mark.parametrize(
    ("windows", "length", "together"),
    [(128, 2048, 1), (64, 512, 1), (100, 16, 1), (256, 64, 4), (2048, 16, 32), (4, 8, 1)],
)
def test_short_windows_share_a_step_where_there_are_many(windows: int, length: int, together: int) -> None:
    assert count_step_windows(windows, length) == together


@pytest.mark.parametrize("name", [name for name in SCHEMES if name not in COLS])
def test_without_a_target_codes_stay_and_the_grid_alone_moves(name: str) -> None:
    linears, error, _ = _two_layers(name)
    steps, turns = Steps(4, codes=0.0), []
    apart = {key: TunedLinear(one.codes, one.grid, None, FLOAT32, steps) for key, one in linears.items()}
    tuning, state = tune(apart, error, range(8), [8], steps, watch=lambda turn, held: turns.append((turn, held)))
    assert tuning.best and tuning.held_after < tuning.held_before and tuning.after < tuning.before
    assert [turn for turn, _ in turns] == list(range(1, len(turns) + 1))
    assert min(held for _, held in turns) == tuning.held_after
    for key, (codes, grid) in state.items():
        moved = (grid.dequantize(codes) - linears[key].grid.dequantize(linears[key].codes)).abs()
        assert float(moved.max()) > 0
        if not name.startswith("NU"):  # levels that change places renumber codes
            assert torch.equal(codes, linears[key].codes)

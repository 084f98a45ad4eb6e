"""Geometry of the figures: inside the plot, in order, and the front as its definition has it."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leangrid.report.plots import RATIOS, Axis, Shades, dots, line, pareto, ratio_step, stairs, strokes

NUMBERS = st.floats(allow_nan=True, allow_infinity=True)
SOUND = st.floats(min_value=-1e12, max_value=1e12)


@given(st.lists(NUMBERS, max_size=20), st.booleans())
def test_a_linear_axis_holds_its_values(values: list[float], zero: bool) -> None:
    kept = [value for value in values if math.isfinite(value) and abs(value) < 1e300]
    axis = Axis.linear(kept, zero and all(value >= 0 for value in kept))
    assert axis.low < axis.high and 1 <= len(axis.ticks) <= 12
    assert all(axis.low <= tick <= axis.high for tick in axis.ticks)
    places = [axis.at(value) for value in sorted(kept)]
    assert all(0 <= place <= 100 for place in places) and places == sorted(places)


@given(st.lists(NUMBERS, max_size=20), st.sampled_from([math.inf, 8.0, 1.0]))
def test_a_logarithmic_axis_holds_its_values(values: list[float], decades: float) -> None:
    kept = [value for value in values if not math.isfinite(value) or abs(value) < 1e300]
    kept = [value for value in kept if not 0 < value < 1e-300]
    axis = Axis.logarithmic(kept, decades)
    assert 0 < axis.low < axis.high and all(axis.low <= tick <= axis.high for tick in axis.ticks)
    assert all(0 <= axis.at(value) <= 100 for value in kept if math.isfinite(value))


def test_ticks_are_round() -> None:
    assert Axis.linear([0.0, 100.0], zero=True).ticks == (0.0, 25.0, 50.0, 75.0, 100.0)
    assert Axis.logarithmic([1e-6, 1.0]).ticks == pytest.approx((1e-6, 1e-4, 1e-2, 1.0))
    assert Axis.logarithmic([0.3, 0.5]).ticks == pytest.approx((0.3, 0.5))


def test_paths_leave_out_what_is_no_number() -> None:
    axis = Axis(0.0, 10.0)
    points = [(0.0, 0.0), (math.nan, 1.0), (10.0, 10.0)]
    assert (
        dots(points, axis, axis) == "M0 100h0M100 0h0"
        and line(points, axis, axis) == "M0 100L100 0"
        and line([], axis, axis) == ""
    )
    assert stairs(points, axis, axis) == "M0 100H100V0" and stairs([], axis, axis) == ""
    assert strokes([5.0, math.inf], axis) == "M50 0v100"


def test_steps_of_ratios() -> None:
    assert [ratio_step(value, 1.0) for value in (0.0, 0.25, 0.26, 1.0, 1.25, 1.26)] == [0, 0, 1, 5, 6, 7]
    assert ratio_step(1.0, 0.0) == len(RATIOS) and ratio_step(0.0, 0.0) is None and ratio_step(math.nan, 1.0) is None


@given(st.lists(NUMBERS, max_size=20))
def test_shades_are_in_order(values: list[float]) -> None:
    shades = Shades.over(values)
    assert list(shades.edges) == sorted(shades.edges) and len(shades.edges) == 8
    kept = sorted(value for value in values if math.isfinite(value))
    steps = [shades.step(value) for value in kept]
    assert all(step is not None and 0 <= step <= 6 for step in steps) and steps == sorted(steps)  # pyright: ignore
    assert shades.step(math.nan) is None


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5) | st.just(math.nan)), max_size=8))
def test_the_front_is_what_nobody_beats(points: list[tuple[float, float]]) -> None:
    front = pareto(points)
    sound = [index for index, point in enumerate(points) if not math.isnan(point[1])]
    for index in sound:
        beaten = any(
            points[o][0] <= points[index][0] and points[o][1] <= points[index][1] and points[o] != points[index]
            for o in sound
        )
        assert (index in front) == (not beaten)
    assert front <= set(sound) and bool(front) == bool(sound)

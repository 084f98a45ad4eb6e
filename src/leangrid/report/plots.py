"""Geometry of the figures: values as per cent of a plot, ticks, colour steps. The templates draw them.

A plot is a square of 100 by 100 that the page stretches to the width that it has. Text is placed over it as HTML, so
that it is not stretched. y points down, as in SVG."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from leangrid.report.facts import finite

RATIOS = (0.25, 0.35, 0.5, 0.7, 0.85, 1.0, 1.25)  # between the eight colours of a loss beside another
Number = int | float
_LEAST = 1e-12


@dataclass(frozen=True)
class Axis:
    """An axis from ``low`` to ``high``, linear or logarithmic; ``ticks`` are values between them."""

    low: float
    high: float
    log: bool = False
    ticks: tuple[float, ...] = ()

    @classmethod
    def linear(cls, values: Iterable[Number], zero: bool = False, count: int = 5) -> "Axis":
        """An axis around the finite ``values`` with a margin; with ``zero`` it begins at 0. About ``count`` ticks."""
        usable = [value for value in values if finite(value)] or [0.0, 1.0]
        low, high = (0.0 if zero else min(usable)), max(usable)
        room = 0.04 * (high - low) or abs(high) * 0.1 or 1.0
        low, high = (low if zero else low - room), high + room
        step = _round_step((high - low) / count)
        first = math.ceil(low / step - 1e-9)
        ticks = [step * index for index in range(first, first + 20 * count) if step * index <= high]
        return cls(low, high, False, tuple(ticks))

    @classmethod
    def logarithmic(cls, values: Iterable[Number], decades: Number = math.inf, count: int = 6) -> "Axis":
        """A logarithmic axis around the positive finite ``values``, at most ``decades`` below the largest."""
        usable = [value for value in values if finite(value) and value > 0] or [1.0]
        high, low = math.log10(max(usable)), math.log10(min(usable))
        low = max(low, high - decades)
        room = 0.06 * (high - low) or 0.5
        low, high = low - room, high + room
        first, last = math.ceil(low), math.floor(high)
        if last - first >= 1:
            every = max(1, math.ceil((last - first + 1) / count))
            ticks = [10.0**power for power in range(first, last + 1) if power % every == 0]
        else:
            ticks = [digit * 10.0**power for power in (first - 1, first) for digit in (1, 1.5, 2, 3, 5, 7)]
        return cls(10**low, 10**high, True, tuple(tick for tick in ticks if 10**low <= tick <= 10**high))

    def at(self, value: Number) -> float:
        """Per cent of the way from ``low`` to ``high``, within 0 and 100."""
        if self.log:
            place = math.log10(max(value, _LEAST) / self.low) / math.log10(self.high / self.low)
        else:
            place = (value - self.low) / (self.high - self.low)
        return round(100 * min(1.0, max(0.0, place)), 2)

    def down(self, value: Number) -> float:
        """The same for a vertical axis: per cent from the top."""
        return round(100 - self.at(value), 2)


def dots(points: Iterable[tuple[Number, Number]], x: Axis, y: Axis) -> str:
    """A path with a dot at each point whose coordinates are finite: lines of length 0, whose round ends stay round when
    the plot is stretched."""
    return "".join(f"M{x.at(a):g} {y.down(b):g}h0" for a, b in points if finite(a) and finite(b))


def line(points: Iterable[tuple[Number, Number]], x: Axis, y: Axis) -> str:
    """A path through the points whose coordinates are finite."""
    usable = [f"{x.at(a):g} {y.down(b):g}" for a, b in points if finite(a) and finite(b)]
    return "M" + "L".join(usable) if usable else ""


def stairs(points: Iterable[tuple[Number, Number]], x: Axis, y: Axis) -> str:
    """A path through the points in horizontal and vertical steps: the border of what a front dominates."""
    usable = [(x.at(a), y.down(b)) for a, b in points if finite(a) and finite(b)]
    return f"M{usable[0][0]:g} {usable[0][1]:g}" + "".join(f"H{a:g}V{b:g}" for a, b in usable[1:]) if usable else ""


def strokes(values: Iterable[Number], x: Axis) -> str:
    """A path with a line from top to bottom at each value."""
    return "".join(f"M{x.at(value):g} 0v100" for value in values if finite(value))


def ratio_step(loss: Number, other: Number) -> int | None:
    """0 (``loss`` far below ``other``) to 7 (far above), by RATIOS; None where the ratio is undefined."""
    if not (finite(loss) and finite(other)) or loss < 0 or other < 0 or loss == other == 0:
        return None
    return sum(loss > edge * other for edge in RATIOS)


@dataclass(frozen=True)
class Shades:
    """Colour steps over positive values, each for the same number of values, because losses span five decades and most
    of them lie in one."""

    edges: tuple[float, ...]

    @classmethod
    def over(cls, values: Iterable[Number], count: int = 7) -> "Shades":
        """``count`` steps between the quantiles of the positive finite values."""
        usable = sorted(value for value in values if finite(value) and value > 0) or [1.0]
        return cls(tuple(usable[round(index / count * (len(usable) - 1))] for index in range(count + 1)))

    def step(self, value: Number) -> int | None:
        """0 (smallest) to count - 1; None for a value that is not finite."""
        return sum(value > edge for edge in self.edges[1:-1]) if finite(value) else None


def pareto(points: Sequence[tuple[Number, Number]]) -> set[int]:
    """Indices of the Pareto front: points for which no other is as small in both coordinates and smaller in one. Points
    that are not finite are not in it."""
    front = set()
    for index, (a, b) in enumerate(points):
        if finite(a) and finite(b):
            beaten = (c <= a and d <= b and (c, d) != (a, b) for c, d in points if finite(c) and finite(d))
            if not any(beaten):
                front.add(index)
    return front


def _round_step(rough: Number) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)

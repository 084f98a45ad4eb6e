"""Counts floating-point operations: the least that a run needs, and those it does. A multiply-add counts as two.

Only matrix products and factorizations are counted, not the search for grids (comparisons) and packing (shifts)."""

from dataclasses import dataclass, field

_WHOLE = 256  # columns up to which a triangle is inverted by a solve against the identity (solve/factor.py)


@dataclass
class FlopCounts:
    """Operations by stage. ``needed``: the least that the recipe takes. ``done``: those computed, with baselines."""

    needed: dict[str, float] = field(default_factory=dict)
    done: dict[str, float] = field(default_factory=dict)

    def add(self, stage: str, needed: float, done: float) -> None:
        """Add operations to ``stage``."""
        self.needed[stage] = self.needed.get(stage, 0.0) + needed
        self.done[stage] = self.done.get(stage, 0.0) + done

    def report(self) -> dict[str, dict[str, float]]:
        """{"needed": {"total": ..., stage: ...}, "done": the same}."""
        return {
            kind: {"total": sum(counts.values(), 0.0)} | {stage: count for stage, count in counts.items() if count}
            for kind, counts in (("needed", self.needed), ("done", self.done))
        }


def product(rows: int, cols: int, tokens: int) -> float:
    """The product of a weight [rows, cols] with activations [cols, tokens], or any product of these sizes."""
    return 2.0 * rows * cols * tokens


def hessian(tokens: int, cols: int, streams: int, block: int = 1) -> float:
    """The Hessian of ``tokens`` inputs of ``cols`` features.

    One triangle of X~^T X~, computed in squares of ``block`` columns; with two streams also all of X^T X~."""
    return tokens * cols * (cols + block) + (2.0 * tokens * cols * cols if streams == 2 else 0.0)


def factor(cols: int, done: bool, halves: bool = True) -> float:
    """The Cholesky factorization of [cols, cols] and the inverse of its factor.

    ``done``: as computed, where the inverse is a solve against the identity, for all columns at once or, by ``halves``
    (on a CPU), for some hundred; else the least that is needed."""
    whole = min(cols, _WHOLE) if halves else cols
    return 2 / 3 * cols**3 + (2 / 3 * cols * whole**2 if done else 0.0)


def correction(rows: int, cols: int, done: bool, measured: bool = False) -> float:
    """The correction W (G - H)(H + lambda I)^-1 for all rows of a group; with its share of each layer, if ``measured``.

    ``done``: as computed, with two whole products where two triangular ones are enough; else the least."""
    few = min(rows, cols)
    if measured:  # G - H and its noise times U^T; W times both; one of them times U, for the rows
        return (3 if done else 2.5) * product(rows, cols, cols) + (2 if done else 1) * product(few, cols, cols)
    return product(rows, cols, cols) + (2 if done else 1) * product(few, cols, cols)


def sweep(rows: int, cols: int) -> float:
    """The sweep of GPTQ: the error of each column is added to all later columns."""
    return float(rows) * cols * cols


def exact(rows: int, cols: int) -> float:
    """LeanQuant-Exact: each row removes its columns from its own inverse Hessian, a triangle: n^3/6 multiply-adds."""
    return float(rows) * cols**3 / 3


def layer_loss(rows: int, cols: int) -> float:
    """The layer loss tr(E H E^T) of an error E [rows, cols]."""
    return product(rows, cols, cols)


def refine(rows: int, cols: int, rounds: int) -> float:
    """The refinement. Each round: a gradient, the normal equations of a refit, a descent; then one more refit."""
    return (rounds * (2 * product(rows, cols, cols) + sweep(rows, cols)) + sweep(rows, cols)) if rounds else 0.0

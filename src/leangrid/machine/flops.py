"""Floating-point operations: what a run must do at least, and what it did. A product and a sum are two.

Only products of matrices and factorizations are counted. Grids are found by comparing, packing by shifting: they have
no count."""

from dataclasses import dataclass, field


@dataclass
class Work:
    """Operations by stage. ``needed`` is the least the recipe asks for, ``done`` what was computed, baselines
    included."""

    needed: dict[str, float] = field(default_factory=dict)
    done: dict[str, float] = field(default_factory=dict)

    def add(self, stage: str, needed: float, done: float) -> None:
        """Count one piece of work."""
        self.needed[stage] = self.needed.get(stage, 0.0) + needed
        self.done[stage] = self.done.get(stage, 0.0) + done

    def report(self) -> dict[str, dict[str, float]]:
        """{"needed": {"total": ..., stage: ...}, "done": the same}."""
        return {
            kind: {"total": sum(counts.values(), 0.0)} | {stage: count for stage, count in counts.items() if count}
            for kind, counts in (("needed", self.needed), ("done", self.done))
        }


def product(rows: int, cols: int, tokens: int) -> float:
    """A linear of [rows, cols] for some tokens, or any product of those three sizes."""
    return 2.0 * rows * cols * tokens


def hessian(tokens: int, cols: int, streams: int, block: int = 1) -> float:
    """One triangle of X~^T X~, in squares of ``block`` columns; all of X^T X~ with two streams."""
    return tokens * cols * (cols + block) + (2.0 * tokens * cols * cols if streams == 2 else 0.0)


def factor(cols: int, done: bool) -> float:
    """Cholesky, and the inverse of its factor; the inverse is done as a solve with the whole identity."""
    return cols**3 / 3 + (cols**3 if done else cols**3 / 3)


def correction(rows: int, cols: int, done: bool) -> float:
    """W (G - H)(H + lambda I)^-1 for all rows of a group; done with two whole products where two triangles would do."""
    few = min(rows, cols)
    return product(rows, cols, cols) + (2 if done else 1) * product(few, cols, cols)


def sweep(rows: int, cols: int) -> float:
    """Every column's error carried to all later columns."""
    return float(rows) * cols * cols


def exact(rows: int, cols: int) -> float:
    """LeanQuant-Exact: each row takes its columns out of an inverse of its own, one triangle, n^3/6 products and
    sums."""
    return float(rows) * cols**3 / 3


def layer_loss(rows: int, cols: int) -> float:
    """tr(E H E^T)."""
    return product(rows, cols, cols)


def refine(rows: int, cols: int, rounds: int) -> float:
    """Each round: the gradient of what came before, the normal equations of a refit, a descent; then one more refit."""
    return (rounds * (2 * product(rows, cols, cols) + sweep(rows, cols)) + sweep(rows, cols)) if rounds else 0.0

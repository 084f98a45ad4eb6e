"""The factor of a Hessian by halves, beside how it was made before: CPU seconds of one thread, one JSON line a width.

    python benchmarks/factor.py --out benchmarks/results/factor.jsonl

``before``: after each half of a Cholesky factorization the product of the rows below with themselves was formed whole,
and L^-1 was a solve against the identity. ``now``: ``split_cholesky_`` and ``invert_triangular_`` of solve/factor.py.
Both take turns in one process; the best of ``--turns`` is kept, since other work on the machine only ever adds time.
``apart``: ||now - before|| / ||before|| of L^-1. ``rate``: FLOP/s of a product of 1,024 columns in the same process.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from common import lines
from common.machine import provenance
from leangrid.solve.factor import invert_triangular_, split_cholesky_

LEAF, SQUARE = 64, 1024


def hessian(cols: int) -> Tensor:
    """Low-rank plus a diagonal that falls over two decades."""
    g = torch.Generator().manual_seed(cols)
    low, diagonal = torch.randn(cols, cols // 8, generator=g), 10.0 ** (-2 * torch.rand(cols, generator=g))
    return low @ low.T / low.shape[1] * (diagonal[:, None] * diagonal).sqrt() + torch.diag(diagonal)


def cholesky_before(matrix: Tensor) -> Tensor:
    size = len(matrix)
    if size <= LEAF:
        return matrix.copy_(torch.linalg.cholesky(matrix))
    half = -(-size // (2 * LEAF)) * LEAF
    first, below, last = matrix[:half, :half], matrix[half:, :half], matrix[half:, half:]
    cholesky_before(first)
    below.copy_(torch.linalg.solve_triangular(first.T, below, upper=True, left=False))
    last.addmm_(below, below.T, alpha=-1)
    matrix[:half, half:] = 0
    cholesky_before(last)
    return matrix


def cholesky_now(matrix: Tensor) -> Tensor:
    if not split_cholesky_(matrix):
        raise RuntimeError("not positive definite")
    return matrix


def inverse_before(lower: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(lower, torch.eye(len(lower)), upper=False)


def seconds_of(call: Callable[[], object]) -> float:
    begin = time.process_time()
    call()
    return time.process_time() - begin


def compare(cols: int, turns: int) -> dict[str, object]:
    matrix, square = hessian(cols), torch.ones(SQUARE, SQUARE)
    lower = cholesky_now(matrix.clone())
    before, now = inverse_before(lower), invert_triangular_(lower.clone())
    calls: dict[str, Callable[[], object]] = {
        "cholesky_before": lambda: cholesky_before(matrix.clone()),
        "cholesky_now": lambda: cholesky_now(matrix.clone()),
        "inverse_before": lambda: inverse_before(lower),
        "inverse_now": lambda: invert_triangular_(lower.clone()),
        "product": lambda: square @ square,
    }
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(turns):
        for name, call in calls.items():
            best[name] = min(best[name], seconds_of(call))
    rate = 2 * SQUARE**3 / best.pop("product")
    apart = float((now - before).norm() / before.norm())
    return {name: round(value, 5) for name, value in best.items()} | {"apart": apart, "rate": round(rate / 1e9) * 1e9}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cols", type=int, nargs="+", default=[576, 896, 1536, 4864])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for cols in options.cols:
        head = {"benchmark": "factor", "cols": cols, "threads": 1, "turns": options.turns}
        lines.show(head | compare(cols, options.turns) | provenance(), options.out)


if __name__ == "__main__":
    main()

"""How does the cost of each stage grow? One JSON line for each stage and variable; the others stay at a base point.

    # then benchmarks/figures.py draws docs/figures
    python benchmarks/scaling.py --out benchmarks/results/scaling.jsonl
    # two stages around a small base point, in seconds
    python benchmarks/scaling.py --stages affine sweep --small

One thread; CPU seconds of the process, the best of the repeats: other work on the machine only ever adds time.
``exponent`` is the slope of log(seconds) over log(value) by least squares, ``exponent_end`` that of the last two points
alone, ``exponent_flops`` the slope that the counted operations (the ``*_cost`` functions below) have at the same
points. For bits the value is the number of levels 2^bits. Weights are heavy-tailed; the Hessian is low-rank plus a
diagonal that falls over two decades, which is random but resembles that of real layers.
"""

import argparse
import functools
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import lines
from common.machine import provenance
from leangrid import kernels
from leangrid.formats.bit_stream import pack
from leangrid.grids import AffineGrid, Precision, fit_affine, fit_nonuniform
from leangrid.recipe import Recipe
from leangrid.solve.factor import Factor, factorize
from leangrid.solve.hessian import HessianSum
from leangrid.solve.layer import solve_linear
from leangrid.solve.refine import refine
from leangrid.solve.sweep import sweep

BLOCK, PANEL, TILE = (
    128,
    512,
    32,
)  # columns of a sweep block, of a float32 Hessian GEMM, of a square of bfloat16 matrix tiles
ENOUGH_SECONDS, MOST_CALLS = 0.1, 20  # a short call is repeated more often than asked, within these


@dataclass(frozen=True)
class Point:
    """One problem: a weight [rows, cols], the number of calibration tokens, T (``steps``), bits and group size."""

    rows: int = 512
    cols: int = 1024
    tokens: int = 4096
    steps: int = 2048
    bits: int = 4
    group_size: int = 128


VALUES: dict[str, tuple[int, ...]] = {
    "rows": (128, 256, 512, 1024, 2048),
    "cols": (256, 512, 1024, 2048, 4096),
    "tokens": (1024, 2048, 4096, 8192, 16384),
    "steps": (256, 512, 1024, 2048, 4096, 8192),
    "bits": (2, 3, 4),
    "group_size": (32, 64, 128, 256, 512, 1024),
}
SMALL = Point(rows=128, cols=512, tokens=1024)


@dataclass(frozen=True)
class Cost:
    """What a stage has to do: floating-point operations (None where it mainly compares and looks up), and bytes of main
    memory."""

    flops: float | None
    bytes: float


@dataclass(frozen=True)
class Stage:
    """``prepare`` returns the call that is timed; ``variables`` are those the stage depends on."""

    variables: tuple[str, ...]
    prepare: Callable[[Point], Callable[[], object]]
    cost: Callable[[Point], Cost]


# ---------------------------------------------------------------------------------------------- the problem


@functools.lru_cache(maxsize=2)
def weight(rows: int, cols: int) -> Tensor:
    g = torch.Generator().manual_seed(rows + cols)
    return torch.randn(rows, cols, generator=g) * torch.exp(0.5 * torch.randn(rows, cols, generator=g)) * 0.02


@functools.lru_cache(maxsize=2)
def hessian(cols: int) -> Tensor:
    g = torch.Generator().manual_seed(cols)
    low = torch.randn(cols, max(1, cols // 8), generator=g)
    diagonal = 10.0 ** (-2 * torch.rand(cols, generator=g))
    return low @ low.T / low.shape[1] * (diagonal[:, None] * diagonal).sqrt() + torch.diag(diagonal)


@functools.lru_cache(maxsize=2)
def factor(cols: int) -> Factor:
    return factorize(hessian(cols))


def affine(at: Point) -> AffineGrid:
    importance = factor(at.cols).loss_error_weights(2.0)
    return fit_affine(
        weight(at.rows, at.cols), importance, at.bits, 64, at.group_size, scale_dtype=torch.bfloat16
    )  # T does not matter here


# ---------------------------------------------------------------------------------------------- the stages


def _hessian(at: Point, dtype: torch.dtype = torch.float32) -> Callable[[], object]:
    x = torch.randn(at.tokens, at.cols, generator=torch.Generator().manual_seed(0)).to(dtype)
    return lambda: HessianSum(at.cols).add(x)


def _affine(at: Point) -> Callable[[], object]:
    w, importance = weight(at.rows, at.cols), factor(at.cols).loss_error_weights(2.0)
    return lambda: fit_affine(w, importance, at.bits, at.steps, at.group_size, scale_dtype=torch.bfloat16)


def _nonuniform(at: Point) -> Callable[[], object]:
    w, importance = weight(at.rows, at.cols), factor(at.cols).loss_error_weights(4.0)
    return lambda: fit_nonuniform(w, importance, 2**at.bits)


def _sweep(at: Point) -> Callable[[], object]:
    w, made, grid = weight(at.rows, at.cols), factor(at.cols), affine(at)
    return lambda: sweep(w, made, grid)


def _refine_affine(at: Point) -> Callable[[], object]:
    w, made, grid = weight(at.rows, at.cols), factor(at.cols), affine(at)
    codes = sweep(w, made, grid).codes
    return lambda: refine(w, codes, grid, made.damped, 1, Precision(torch.bfloat16))


def _refine_nonuniform(at: Point) -> Callable[[], object]:
    w, made = weight(at.rows, at.cols), factor(at.cols)
    grid = fit_nonuniform(w, made.loss_error_weights(4.0), 2**at.bits, "lloyd")
    codes = sweep(w, made, grid).codes
    return lambda: refine(w, codes, grid, made.damped, 1, Precision(torch.bfloat16))


def _pack(at: Point) -> Callable[[], object]:
    codes = torch.randint(
        0, 2**at.bits, (at.rows, at.cols), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    return lambda: pack(codes, at.bits)


def _linear(at: Point) -> Callable[[], object]:
    recipe = Recipe(scheme=f"W{at.bits}A16_G{at.group_size}", steps=at.steps).resolved()
    w, made, matrix = weight(at.rows, at.cols), factor(at.cols), hessian(at.cols)
    return lambda: solve_linear(w, made, matrix, recipe, Precision(torch.bfloat16))


def hessian_cost(at: Point, panel: int = PANEL, size: int = 4) -> Cost:
    """The cost of the upper triangle in panels of columns, with ``size`` bytes for each activation."""
    panels = [(min(panel, at.cols - start), at.cols - start) for start in range(0, at.cols, panel)]
    elements = sum(width * right for width, right in panels)
    return Cost(2.0 * at.tokens * elements, float(size * at.tokens * at.cols + 8 * elements))


def factor_cost(at: Point) -> Cost:
    # Cholesky n^3/3 and L^-1 by halves n^3/3, 8 probes through three matrices
    return Cost(2 / 3 * at.cols**3 + 48.0 * at.cols**2, 4.0 * 8 * at.cols**2)


def _trailing(cols: int) -> int:
    """Pairs (column, later column of another block), which one GEMM a block updates."""
    return sum(
        (min(start + BLOCK, cols) - start) * (cols - min(start + BLOCK, cols)) for start in range(0, cols, BLOCK)
    )


def _inside(cols: int) -> int:
    """Pairs of columns of the same block, which the kernel updates."""
    return sum((width := min(BLOCK, cols - start)) * (width - 1) // 2 for start in range(0, cols, BLOCK))


def sweep_cost(at: Point) -> Cost:
    touched = sum(
        at.cols - start for start in range(0, at.cols, BLOCK)
    )  # columns read and written, summed over the blocks
    return Cost(2.0 * at.rows * (_trailing(at.cols) + _inside(at.cols)), 4.0 * (2 * at.rows * touched + at.cols**2 / 2))


def refine_affine_cost(at: Point, rounds: int = 1) -> Cost:
    groups, size = at.cols // at.group_size, at.group_size
    state = 2.0 * at.rows * at.cols**2  # the gradient E H, anew for each grid
    normal = sum(2.0 * at.rows * size * (at.cols - g * size) for g in range(groups))
    return _refine_cost(
        at, rounds, state, normal + at.rows * (groups**3 / 3 + 2.0 * groups**2)
    )  # solved, and the step judged


def refine_nonuniform_cost(at: Point, rounds: int = 1) -> Cost:
    state = 2.0 * at.rows * at.cols**2
    normal = at.rows * (
        at.cols**2 / 2 + 8.0**at.bits / 3 + 2.0 * 4**at.bits
    )  # P^T H P by additions; solved, and the step judged
    return _refine_cost(at, rounds, state, normal)


def _refine_cost(at: Point, rounds: int, state: float, refit: float) -> Cost:
    descent = 2.0 * at.rows * (at.cols**2 + _inside(at.cols))
    passes = at.cols // BLOCK * rounds + 4 * (
        rounds + 1
    )  # over [rows, cols]: a GEMM a block, and the elementwise work of a refit
    work = (rounds + 1) * (state + refit) + rounds * descent
    return Cost(work, 4.0 * (2 * at.rows * at.cols * passes + (3 * rounds + 2) * at.cols**2))


def elements_cost(read: float, written: float) -> Callable[[Point], Cost]:
    """The cost of a stage that reads and writes so many bytes for each weight, without products."""
    return lambda at: Cost(None, at.rows * at.cols * (read + written))


def linear_cost(at: Point) -> Cost:
    parts = (sweep_cost(at), sweep_cost(at), refine_affine_cost(at))  # the baseline's sweep and the learned grid's
    rounding = 2.0 * at.rows * at.cols**2  # its loss; the solver knows the others
    return Cost(
        sum(part.flops or 0.0 for part in parts) + rounding,
        sum(part.bytes for part in parts) + 12.0 * at.rows * at.cols,
    )


_SHAPE = ("rows", "cols", "bits")
STAGES: dict[str, Stage] = {
    "hessian": Stage(("cols", "tokens"), _hessian, hessian_cost),
    "hessian bf16": Stage(
        ("cols", "tokens"), lambda at: _hessian(at, torch.bfloat16), lambda at: hessian_cost(at, TILE, 2)
    ),
    "factor": Stage(("cols",), lambda at: functools.partial(factorize, hessian(at.cols)), factor_cost),
    "affine": Stage((*_SHAPE, "steps", "group_size"), _affine, elements_cost(4, 0)),
    "nonuniform": Stage(_SHAPE, _nonuniform, elements_cost(4, 0)),
    "sweep": Stage((*_SHAPE, "group_size"), _sweep, sweep_cost),
    "refine": Stage((*_SHAPE, "group_size"), _refine_affine, refine_affine_cost),
    "refine levels": Stage(_SHAPE, _refine_nonuniform, refine_nonuniform_cost),
    "pack": Stage(_SHAPE, _pack, elements_cost(1, 0.5)),
    "linear": Stage((*_SHAPE, "steps", "group_size"), _linear, linear_cost),
}


# ---------------------------------------------------------------------------------------------- measuring


def best_of(repeats: int, work: Callable[[], object]) -> float:
    """CPU seconds of the fastest of at least ``repeats`` calls, after one to warm up."""
    work()
    times: list[float] = []
    while len(times) < repeats or (sum(times) < ENOUGH_SECONDS and len(times) < MOST_CALLS):
        begin = time.process_time()
        work()
        times.append(time.process_time() - begin)
    return min(times)


def slope(values: list[float], results: list[float]) -> float:
    """The exponent e of result = c value^e: the slope of log(result) over log(value) by least squares."""
    x, y = [math.log(value) for value in values], [math.log(result) for result in results]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def limits(repeats: int) -> dict[str, float]:
    """What one thread reaches at best on this machine: a float32 GEMM in GFLOP/s, and a copy of memory in GB/s (read
    and written)."""
    a, b = torch.randn(1536, 1536), torch.randn(1536, 1536)
    source = torch.randn(1 << 26)
    target = torch.empty_like(source)
    return {"gemm_gflops": round(2e-9 * 1536**3 / best_of(repeats, lambda: a @ b), 1),
            "copy_gb": round(8e-9 * source.numel() / best_of(repeats, lambda: target.copy_(source)), 2)}  # fmt: skip


def measure_stage(name: str, variable: str, base: Point, repeats: int) -> dict[str, Any]:
    """The fields of one line: the seconds of stage ``name`` over the values of ``variable``, the rest as in
    ``base``."""
    stage = STAGES[name]
    values = [value for value in VALUES[variable] if variable != "group_size" or base.cols % value == 0]
    points = [replace(base, **{variable: value}) for value in values]
    seconds = [best_of(repeats, stage.prepare(at)) for at in points]
    costs = [stage.cost(at) for at in points]
    x = [2.0**value if variable == "bits" else float(value) for value in values]
    flops = [cost.flops for cost in costs if cost.flops is not None]
    line: dict[str, Any] = {
        "stage": name,
        "variable": variable,
        "base": {f.name: getattr(base, f.name) for f in fields(base)},
        "values": values,
        "seconds": [float(f"{second:.4g}") for second in seconds],
        "exponent": round(slope(x, seconds), 3),
        "exponent_end": round(slope(x[-2:], seconds[-2:]), 3),
    }
    if flops:
        line |= {"exponent_flops": round(slope(x, flops), 3), "flops": flops}
        line["gflops"] = round(max(f / s for f, s in zip(flops, seconds, strict=True)) / 1e9, 1)
    line["bytes"] = [cost.bytes for cost in costs]
    line["gb"] = round(max(cost.bytes / s for cost, s in zip(costs, seconds, strict=True)) / 1e9, 2)
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, default=list(STAGES), metavar="STAGE", help=", ".join(STAGES)
    )
    parser.add_argument(
        "--variables", nargs="+", choices=VALUES, default=list(VALUES), metavar="VARIABLE", help=", ".join(VALUES)
    )
    parser.add_argument(
        "--small",
        action="store_true",
        help=f"around {SMALL.rows} x {SMALL.cols} instead of {Point().rows} x {Point().cols}",
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="results file; a line of the same measurement is replaced")
    options = parser.parse_args()
    torch.set_num_threads(1)
    base, origin = SMALL if options.small else Point(), provenance()
    best = limits(options.repeats)
    for variable in options.variables:  # in this order the Factor of a width is made once for all stages
        for name in options.stages:
            if variable not in STAGES[name].variables:
                continue
            found = measure_stage(name, variable, base, options.repeats)
            if "gflops" in found:
                found["share_of_gemm"] = round(found["gflops"] / best["gemm_gflops"], 3)
            line = {"benchmark": "scaling", "threads": 1, "kernels": kernels.backend(), **found, **best} | origin
            print(f"{name} over {variable}: exponent {line['exponent']:.2f}", file=sys.stderr, flush=True)
            lines.show(line, options.out)


if __name__ == "__main__":
    main()

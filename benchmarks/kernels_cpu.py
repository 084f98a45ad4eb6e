"""How fast are the CPU kernels? One thread, on every instruction set of this machine. Prints one JSON line.

    python benchmarks/kernels_cpu.py [--rows 64] [--cols 4096] [--repeats 5]

The line holds microseconds a row. Exceptions: ``*_g64`` and ``*_g128`` are microseconds a group (scale rounded to
bfloat16 unless the name says otherwise), ``*_576`` and ``*_1536`` a row of that many columns, ``sweep_*`` and
``descend_*`` a row of one block of 128 columns, ``exact_*`` a row of LeanQuant-Exact. Rows are heavy-tailed (Gaussian
times log-normal), importances spread over four decades. The best of the repeats counts, in CPU time of the process:
other work on the machine only ever adds time.
"""

import argparse
import json
import os
import time
from collections.abc import Callable

import torch
from torch import Tensor

from common.machine import provenance
from leangrid import kernels

ISAS = ("portable", "avx2", "avx512")


def best_of(repeats: int, work: Callable[[], object]) -> float:
    """CPU seconds of the fastest of ``repeats`` calls, after one to warm up."""
    work()
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        work()
        times.append(time.process_time() - begin)
    return min(times)


def cases(rows: int, cols: int) -> dict[str, tuple[Callable[[], object], float]]:
    """Name -> (call, number of rows or groups that it processes)."""
    g = torch.Generator().manual_seed(0)

    def heavy(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g) * torch.exp(0.5 * torch.randn(shape, generator=g)) * 0.02

    weight, share = heavy(rows, cols), 10.0 ** (-4 * torch.rand(cols, generator=g, dtype=torch.float64))
    many, block = 1024, 128
    wide = heavy(many, block)
    upper = (torch.eye(block) + 0.05 * torch.randn(block, block, generator=g)).triu()
    x = torch.randn(block, 4 * block, generator=g)
    hessian = x @ x.T / (4 * block)
    levels, _ = kernels.kmeans_lloyd(wide, torch.ones(block, dtype=torch.float64), 16)
    scale, zero = torch.full((many, 1), 0.01), torch.full((many, 1), 8, dtype=torch.uint8)
    group = torch.zeros(block, dtype=torch.int32)
    codes = torch.randint(0, 16, (many, block), generator=g, dtype=torch.uint8)
    big = heavy(cols, cols)
    big = big + big.T
    long_codes = torch.randint(0, 16, (rows, cols), generator=g, dtype=torch.uint8)
    groups = rows * (cols // 128)
    return {
        "kmeans_dp_16": (lambda: kernels.kmeans_dp(weight, share, 16), rows),
        "kmeans_dp_8": (lambda: kernels.kmeans_dp(weight, share, 8), rows),
        "kmeans_lloyd_16": (lambda: kernels.kmeans_lloyd(weight, share, 16), rows),
        "kmeans_sort_only": (lambda: kernels.kmeans_lloyd(weight, share, 2, 1), rows),
        "affine_4": (lambda: kernels.affine_search(weight, share, 4, 2048, 0.2, cols), rows),
        "affine_3": (lambda: kernels.affine_search(weight, share, 3, 2048, 0.3, cols), rows),
        "affine_2": (lambda: kernels.affine_search(weight, share, 2, 2048, 0.4, cols), rows),
        "affine_4_symmetric": (lambda: kernels.affine_search(weight, share, 4, 2048, 0.2, cols, True), rows),
        "affine_4_g128": (
            lambda: kernels.affine_search(weight, share, 4, 2048, 0.2, 128, False, torch.bfloat16),
            groups,
        ),
        "affine_4_g128_f32": (lambda: kernels.affine_search(weight, share, 4, 2048, 0.2, 128), groups),
        "sweep_levels_16": (lambda: kernels.sweep_levels(wide, upper, levels), many),
        "sweep_affine_4": (lambda: kernels.sweep_affine(wide, upper, scale, zero, group, 4), many),
        "descend_levels_16": (lambda: kernels.descend_levels(wide, hessian, codes, levels), many),
        "descend_affine_4": (lambda: kernels.descend_affine(wide, hessian, codes, scale, zero, group, 4), many),
        "level_gram_16": (lambda: kernels.level_gram(big, long_codes, 16), rows),
    } | small_cases()


def small_cases() -> dict[str, tuple[Callable[[], object], float]]:
    """The sizes of a model of 135M weights, groups of 64 and rows of 576 and 1536, whatever --rows and --cols are."""
    g = torch.Generator().manual_seed(1)
    weight = torch.randn(64, 4608, generator=g) * torch.exp(0.5 * torch.randn(64, 4608, generator=g)) * 0.02
    share = 10.0 ** (-4 * torch.rand(4608, generator=g, dtype=torch.float64))

    def search(
        bits: int, shrink: float, size: int, symmetric: bool, dtype: torch.dtype | None
    ) -> tuple[Callable[[], object], float]:
        return lambda: kernels.affine_search(
            weight, share, bits, 2048, shrink, size, symmetric, dtype
        ), weight.numel() // size

    def optimal(levels: int, cols: int) -> tuple[Callable[[], object], float]:
        rows = weight.view(-1, cols)
        return lambda: kernels.kmeans_dp(rows, share[:cols], levels), len(rows)

    def exact(cols: int, rows: int) -> tuple[Callable[[], object], float]:
        part = weight[:rows, :cols].contiguous()
        x = torch.randn(2 * cols, cols, generator=g, dtype=torch.float64)
        inverse = torch.linalg.inv(x.T @ x / cols + 0.01 * torch.eye(cols, dtype=torch.float64))
        levels = kernels.kmeans_lloyd(part, torch.ones(cols, dtype=torch.float64), 16)[0]
        return lambda: kernels.exact_levels(part, inverse, levels), rows

    return {
        "exact_16_384": exact(384, 16),
        "exact_16_1536": exact(1536, 1),
        "affine_4_g64": search(4, 0.2, 64, False, torch.bfloat16),
        "affine_3_g64": search(3, 0.3, 64, False, torch.bfloat16),
        "affine_2_g64": search(2, 0.4, 64, False, torch.bfloat16),
        "affine_4_g32": search(4, 0.2, 32, False, torch.bfloat16),
        "affine_4_g64_symmetric": search(4, 0.2, 64, True, torch.bfloat16),
        "affine_4_g64_f16": search(4, 0.2, 64, False, torch.float16),
        "affine_4_g64_f32": search(4, 0.2, 64, False, None),
        "affine_4_576": search(4, 0.2, 576, False, torch.bfloat16),
        "kmeans_dp_16_576": optimal(16, 576),
        "kmeans_dp_16_1536": optimal(16, 1536),
        "kmeans_dp_8_576": optimal(8, 576),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--cols", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.pop("LEANGRID_KERNELS", None)
    best = kernels.backend().removeprefix("cpu-")
    isas = ("torch",) if best == "torch" else ISAS[: ISAS.index(best) + 1]
    results = {}
    for isa in isas:
        os.environ["LEANGRID_KERNELS"] = isa
        table = cases(args.rows, args.cols)
        results[isa] = {
            name: round(best_of(args.repeats, work) / count * 1e6, 2) for name, (work, count) in table.items()
        }
    line = {
        "benchmark": "kernels_cpu",
        "unit": "CPU microseconds a row (or group), 1 thread",
        "cols": args.cols,
        "rows": args.rows,
    }
    print(json.dumps(line | {"results": results} | provenance()))


if __name__ == "__main__":
    main()

"""How much does a fused, de-duplicated affine search save? The comparison of the paper's Table 5 on one layer.

    python benchmarks/grid_search.py [--rows 4096] [--cols 4096] [--bits 4] [--steps 2048] [--group 128] \\
        [--enumerated 4096]

``enumeration`` is the search as plain torch code does it: for each of the t^2 candidates (168,100 at 4 bits and T =
2048) quantize all weights, sum the weighted squares, keep the better pair of each row; float32, all rows at once. It is
compared with ``torch`` (the same optimum from distinct (S, Z) and prefix sums), ``cpu`` (C++, one thread) and
``triton`` (where there is a GPU). All must reach the same objectives.

On a GPU the default layer is 4096 x 4096. On a CPU it is 64 x 4096, of which 4 rows are enumerated: all 64 take
minutes, though less for each row, since the fixed cost of 2 million small torch calls is then shared. The best of the
repeats counts (seconds on a GPU, CPU seconds of one thread otherwise); the enumeration, being long, runs once. One JSON
line with the microseconds a row of each.
"""

import argparse
import os
import time
from collections.abc import Callable

import torch
from torch import Tensor

from common.lines import text
from common.machine import provenance
from leangrid import kernels
from leangrid.grids.affine import SHRINK
from leangrid.kernels.plain.affine import shrink_steps

Pairs = tuple[Tensor, Tensor]


def enumeration(weight: Tensor, share: Tensor, bits: int, steps: int, t: int) -> Pairs:
    """Scale and zero point, float32 [items] each, of the best of the t^2 candidates of each row. ``weight`` is float32
    [items, n], ``share`` (the importances) float32 [items or 1, n]."""
    top = 2**bits - 1
    lo, hi = weight.amin(1, keepdim=True).clamp(max=0.0), weight.amax(1, keepdim=True).clamp(min=0.0)
    step = (hi - lo) / steps
    best = torch.full_like(lo, torch.inf)
    best_scale, best_zero = torch.ones_like(lo), torch.zeros_like(lo)
    for a in range(t):
        low = lo + a * step
        for c in range(t):
            scale = (hi - c * step - low) / top
            zero = torch.round(-low / scale).clamp(0, top)
            value = (torch.round(weight / scale + zero).clamp(0, top) - zero) * scale
            cost = (share * (value - weight) ** 2).sum(1, keepdim=True)
            better = cost < best
            best = torch.where(better, cost, best)
            best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
    return best_scale[:, 0], best_zero[:, 0]


def objective(weight: Tensor, share: Tensor, pairs: Pairs, bits: int) -> Tensor:
    """sum_j g_j (quant(w_j) - w_j)^2 of each row, float64 [items]."""
    scale, zero = pairs[0].double()[:, None], pairs[1].double()[:, None]
    code = torch.round(weight.double() / scale + zero).clamp(0, 2**bits - 1)
    return (share.double() * (scale * (code - zero) - weight.double()) ** 2).sum(1)


def time_best(work: Callable[[], Pairs], repeats: int, device: torch.device) -> tuple[float, Pairs]:
    """The seconds of the fastest call, after one to warm up, and what the last call returned."""
    times, out = [], work()
    for _ in range(repeats):
        begin = _clock(device)
        out = work()
        times.append(_clock(device) - begin)
    return min(times), out


def time_once(work: Callable[[], Pairs], device: torch.device) -> tuple[float, Pairs]:
    """The seconds of one call, and what it returned."""
    begin = _clock(device)
    out = work()
    return _clock(device) - begin, out


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def measure(args: argparse.Namespace, device: torch.device) -> dict[str, object]:
    """The measured fields of the line. SystemExit where the searches reach different objectives."""
    g = torch.Generator().manual_seed(0)
    weight = (
        torch.randn(args.rows, args.cols, generator=g)
        * torch.exp(0.5 * torch.randn(args.rows, args.cols, generator=g))
        * 0.02
    )
    share = 10.0 ** (-4 * torch.rand(args.cols, generator=g, dtype=torch.float64))
    group, shrink, cpu = args.group or args.cols, SHRINK.get(args.bits, 0.2), torch.device("cpu")
    t = shrink_steps(args.steps, shrink)

    def ours(path: str, where: torch.device) -> tuple[float, Pairs]:
        os.environ["LEANGRID_KERNELS"] = path
        here, importance = weight.to(where), share.to(where)

        def search() -> Pairs:
            return kernels.affine_search(here, importance, args.bits, args.steps, shrink, group)[:2]

        spent, pairs = time_best(search, args.repeats, where)
        return spent / args.rows, (pairs[0].cpu().reshape(-1), pairs[1].cpu().float().reshape(-1))

    few = min(args.enumerated, args.rows)
    items = weight[:few].reshape(-1, group).to(device)
    shares = (
        share.reshape(-1, group).repeat(few, 1).float().to(device)
        if group < args.cols
        else share.float()[None].to(device)
    )
    spent, pairs = time_once(lambda: enumeration(items, shares, args.bits, args.steps, t), device)
    reached = {
        "enumeration": objective(items.cpu(), shares.cpu(), pairs=(pairs[0].cpu(), pairs[1].cpu()), bits=args.bits)
    }
    a_row = {"enumeration": spent / few}
    paths = {"torch": ("torch", device), "cpu": ("", cpu)} | (
        {"triton": ("triton", device)} if device.type == "cuda" else {}
    )
    for name, (path, where) in paths.items():
        a_row[name], pairs = ours(path, where)
        first = (pairs[0][: len(items)], pairs[1][: len(items)])
        reached[name] = objective(items.cpu(), shares.cpu(), first, args.bits)
    os.environ.pop("LEANGRID_KERNELS", None)
    least = torch.stack(list(reached.values())).amin(0)
    worst = {name: float((value / least - 1).max()) for name, value in reached.items()}
    if (
        max(worst.values()) > 1e-4
    ):  # float32 sums of the enumeration may take a neighbouring candidate; more is another answer
        raise SystemExit(f"not the same answer: objectives above the least by {worst}")
    return {
        "candidates": t * t,
        "enumerated_rows": few,
        "microseconds_a_row": {name: round(value * 1e6, 3) for name, value in a_row.items()},
        "times_faster": {
            name: round(a_row["enumeration"] / value, 1) for name, value in a_row.items() if name != "enumeration"
        },
        "objective_above_least": {name: float(f"{value:.1e}") for name, value in worst.items()},
    }


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    full = device.type == "cuda"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096 if full else 64)
    parser.add_argument("--cols", type=int, default=4096)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2048)
    parser.add_argument("--group", type=int, default=0, help="columns a group; 0: whole rows")
    parser.add_argument(
        "--enumerated", type=int, default=4096 if full else 4, help="rows on which the enumeration runs"
    )
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if not full:
        torch.set_num_threads(1)
    unit = "seconds on the GPU (cpu: CPU seconds, its threads together)" if full else "CPU seconds, 1 thread"
    line = {
        "benchmark": "grid_search",
        "unit": unit,
        "threads": torch.get_num_threads(),
        "rows": args.rows,
        "cols": args.cols,
        "bits": args.bits,
        "steps": args.steps,
        "group": args.group,
        "device": device.type,
    }
    print(text(line | measure(args, device) | provenance()))


if __name__ == "__main__":
    main()

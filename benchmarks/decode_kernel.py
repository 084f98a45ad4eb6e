"""How near do the Triton products with packed weights come to the memory bandwidth of the GPU? Shapes of Llama-3-8B.

    python benchmarks/decode_kernel.py [--bits 4 3 2] [--batch 1 4 16] [--rows-by-cols 4096x4096 ...]
    # no GPU: tiny shapes, compared with the dense product, no times
    TRITON_INTERPRET=1 python benchmarks/decode_kernel.py --check

One JSON line for each case: microseconds, GB/s of the bytes that must move (codes, tables, inputs, outputs),
``roofline``: that bandwidth over the one of a copy on this device, and ``dense``: the time of torch's dense bfloat16
product over ours. A case is a CUDA graph of calls on different weights, half a gigabyte of them, so no call finds its
weight in the cache and no launch waits for Python. The median of several replays counts.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from common.lines import text
from common.machine import provenance
from leangrid.formats.bit_stream import pack

SHAPES = ("4096x4096", "1024x4096", "14336x4096", "4096x14336")
TINY = ("40x256", "33x384")
KINDS = {"lut": None, "affine_g128": 128, "affine_row": 0}
WORKING_SET = 1 << 29  # bytes of weights a graph walks through: several times any cache
REPLAYS = 20


@dataclass(frozen=True)
class Case:
    """``calls``, each on weights of its own; the ``bytes`` that one of them must move; and the relative error against
    the dense product."""

    calls: Sequence[Callable[[], Tensor]]
    bytes: int
    error: float


def packed_case(kind: str, rows: int, cols: int, bits: int, batch: int, copies: int, device: str) -> Case:
    """The product of ``kind`` with random codes, in bfloat16."""
    from leangrid.kernels.triton.affine_linear import affine_linear
    from leangrid.kernels.triton.lut_linear import lut_linear

    g = torch.Generator().manual_seed(rows + cols + bits)
    codes = torch.randint(0, 2**bits, (rows, cols), generator=g, dtype=torch.uint8)
    words, x = pack(codes, bits).to(device), torch.randn(batch, cols, generator=g).bfloat16().to(device)
    if kind == "lut":
        tables = (torch.randn(rows, 2**bits, generator=g).sort(1).values.bfloat16().to(device),)
        weight = tables[0].cpu().gather(1, codes.long())
        call = partial(lut_linear, bits=bits)
    else:
        size = KINDS[kind] or cols
        scale = (0.01 + 0.01 * torch.rand(rows, cols // size, generator=g)).bfloat16()
        zero = torch.randint(0, 2**bits, scale.shape, generator=g, dtype=torch.uint8)
        steps = codes.view(rows, -1, size).float() - zero[:, :, None]
        weight = (steps * scale.float()[:, :, None]).view(rows, cols).bfloat16()
        tables = scale.to(device), zero.to(device)
        call = partial(affine_linear, bits=bits, group_size=size)
    calls = [partial(call, x, *(tensor.clone() for tensor in (words, *tables))) for _ in range(copies)]
    want = x.cpu().float() @ weight.float().T
    error = float((calls[0]().cpu().float() - want).norm() / want.norm())
    moved = sum(t.numel() * t.element_size() for t in (words, *tables, x)) + 2 * batch * rows
    return Case(calls, moved, error)


def dense_case(rows: int, cols: int, batch: int, copies: int) -> Case:
    """torch's product with bfloat16 weights."""
    x = torch.randn(batch, cols, device="cuda", dtype=torch.bfloat16)
    weights = [torch.randn(rows, cols, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
    calls = [partial(torch.nn.functional.linear, x, weight) for weight in weights]
    return Case(calls, 2 * (rows * cols + batch * (rows + cols)), 0.0)


def microseconds(calls: Sequence[Callable[[], Tensor]]) -> float:
    """The median time of a call, in a CUDA graph of all calls."""
    for call in calls[:2]:
        call()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(REPLAYS):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(1e3 * start.elapsed_time(stop) / len(calls))
    return median(times[2:])


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a copy on the device."""
    source = torch.empty(WORKING_SET, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * WORKING_SET / (microseconds([lambda: target.copy_(source)] * 4) * 1e-6)


def measure_cases(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The fields of one line for each case."""
    bandwidth = copy_bandwidth()
    for shape in args.rows_by_cols or SHAPES:
        rows, cols = map(int, shape.split("x"))
        for batch in args.batch:
            base = microseconds(dense_case(rows, cols, batch, max(2, WORKING_SET // (2 * rows * cols))).calls)
            for bits in args.bits:
                copies = max(2, WORKING_SET // (rows * cols * bits // 8))
                for kind in KINDS:
                    case = packed_case(kind, rows, cols, bits, batch, copies, "cuda")
                    time = microseconds(case.calls)
                    speed = case.bytes / (time * 1e-6)
                    yield {
                        "shape": shape,
                        "bits": bits,
                        "batch": batch,
                        "kind": kind,
                        "microseconds": round(time, 2),
                        "gb_per_s": round(speed / 1e9, 1),
                        "roofline": round(speed / bandwidth, 3),
                        "dense_microseconds": round(base, 2),
                        "dense": round(base / time, 2),
                        "copy_gb_per_s": round(bandwidth / 1e9, 1),
                        "relative_error": round(case.error, 5),
                    }


def check_cases(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Tiny shapes on any device: the relative errors, without times. The program ends where one is 0.01 or more."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for shape in args.rows_by_cols or TINY:
        rows, cols = map(int, shape.split("x"))
        for bits in args.bits:
            for batch in args.batch:
                for kind in KINDS:
                    error = packed_case(kind, rows, cols, bits, batch, 1, device).error
                    if not error < 0.01:
                        sys.exit(f"{kind} {shape} at {bits} bits, batch {batch}: relative error {error:.3g}")
                    yield {
                        "shape": shape,
                        "bits": bits,
                        "batch": batch,
                        "kind": kind,
                        "relative_error": round(error, 5),
                    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rows-by-cols", nargs="+", metavar="RxC")
    parser.add_argument(
        "--check", action="store_true", help="tiny shapes against the dense product; also under TRITON_INTERPRET=1"
    )
    args = parser.parse_args()
    if not torch.cuda.is_available() and not (args.check and os.environ.get("TRITON_INTERPRET") == "1"):
        sys.exit(
            "decode_kernel: no CUDA device here; "
            "TRITON_INTERPRET=1 with --check tests the same kernels on the CPU, without times"
        )
    import triton

    source = provenance()
    source["versions"]["triton"] = triton.__version__
    for line in check_cases(args) if args.check else measure_cases(args):
        print(text({"benchmark": "decode_kernel", **line, **source}), flush=True)


if __name__ == "__main__":
    main()

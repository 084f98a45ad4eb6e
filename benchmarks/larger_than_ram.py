"""Does a model of several times the memory go through under a hard limit, and how near was the plan's peak?

    # 6 GB of weights, 2 GiB of memory
    python benchmarks/larger_than_ram.py --out benchmarks/results/larger_than_ram.jsonl
    # two minutes, to test the script
    python benchmarks/larger_than_ram.py --gigabytes 1.5 --limit 1.3
    # the same under a control group's limit
    systemd-run --scope -p MemoryMax=2G python benchmarks/larger_than_ram.py

Random bfloat16 weights, many blocks of 24 MB, are written block by block. A process of its own, limited before it
imports anything, plans and quantizes them. The limit is RLIMIT_DATA: the kernel refuses every private writable page
beyond it (heap, anonymous and private mappings, what torch's allocator and threads take), touched or not. Mapped files
and page cache do not count. A control group's limit counts both but reclaims page cache, so it is stricter only where
pages cannot be reclaimed. One JSON line: the plan's peak, VmHWM (with mapped files), the peaks of RssAnon and VmData
(sampled), seconds, and the bytes of the weights.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

GIB = 2**30


def _status(*fields: str) -> list[int]:
    """Fields of /proc/self/status in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return [int(lines[field].split()[0]) * 1024 for field in fields]


class Sampler(threading.Thread):
    """Records the largest RssAnon and VmData, fifty times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peaks = [0, 0]
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.02):
            self.peaks = [max(pair) for pair in zip(self.peaks, _status("RssAnon", "VmData"), strict=True)]


def run_limited(options: argparse.Namespace) -> dict[str, Any]:
    """Set the limit, plan, quantize, and return the measured fields. This runs in a process of its own."""
    limit = int(options.limit * GIB)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    import torch

    import leangrid

    torch.set_num_threads(options.threads)
    start = _status("VmHWM", "VmData")
    recipe = leangrid.Recipe(
        scheme=options.scheme,
        samples=options.samples,
        length=options.length,
        correct=options.correct,
        refine=options.refine,
    )
    planned = leangrid.plan(options.folder / "source", recipe, threads=options.threads, out=options.folder / "out")
    windows = torch.randint(512, (options.samples, options.length), generator=torch.Generator().manual_seed(0))
    sampler = Sampler()
    sampler.start()
    began = time.perf_counter()
    result = leangrid.quantize(
        options.folder / "source", options.folder / "out", recipe, windows=windows, threads=options.threads
    )
    took = time.perf_counter() - began
    sampler.over.set()
    anonymous, data = sampler.peaks
    return {
        "weights_bytes": planned.bytes_before,
        "limit": "RLIMIT_DATA, hard",
        "limit_bytes": limit,
        "planned_peak_bytes": planned.peak_ram_bytes,
        "available_bytes": planned.available_ram_bytes,
        "peak_resident_bytes": result.peak_ram_bytes,
        "peak_anonymous_bytes": anonymous,
        "peak_data_bytes": data,
        "at_start": dict(zip(("resident_bytes", "data_bytes"), start, strict=True)),
        "planned_over_resident": round(planned.peak_ram_bytes / result.peak_ram_bytes, 3),
        "placement": planned.placement,
        "planned_seconds": planned.seconds["total"],
        "seconds": round(took, 1),
        "blocks": result.layers // 7,
        "bytes": result.bytes,
        "rescues": result.rescues,
        "loss_over_minmax": round(result.loss / result.loss_minmax, 4),
        "quality": result.quality,
        "windows": options.samples,
        "length": options.length,
        "threads": options.threads,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=6.0, help="of weights, 10^9 bytes")
    parser.add_argument("--limit", type=float, default=2.0, metavar="GIB", help="of RLIMIT_DATA")
    parser.add_argument("--scheme", default="W4A16")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--correct", type=float, default=0.5)
    parser.add_argument("--refine", type=int, default=0, help="rounds; 0 leaves the sweep as it is")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--folder", type=Path, help="where source and result are written; a temporary one where none is given"
    )
    parser.add_argument("--limited", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="results file; a line of the same measurement is replaced")
    options = parser.parse_args()
    if options.limited:
        print(json.dumps(run_limited(options)))
        return
    from common import lines
    from common.machine import provenance
    from common.random_model import checkpoint

    made_by = provenance()  # before the minutes in which files may change
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        options.folder = Path(temporary)
        checkpoint(options.folder / "source", "narrow", round(options.gigabytes * 1e9 / 24.1e6), "cpu")
        asked = [
            f"--{name}={getattr(options, name)}"
            for name in ("limit", "scheme", "samples", "length", "correct", "refine", "threads", "folder")
        ]
        child = subprocess.run(
            [sys.executable, __file__, "--limited", *asked], capture_output=True, text=True, check=False
        )
        if child.returncode:
            raise SystemExit(f"the limited process ended with {child.returncode}:\n{child.stderr[-2000:]}")
        found = json.loads(child.stdout.splitlines()[-1])
    line = {
        "benchmark": "larger_than_ram",
        "model": "narrow",
        "scheme": options.scheme,
        "variant": f"{options.gigabytes:g} GB",
        **found,
        **made_by,
    }
    lines.show(line, options.out)


if __name__ == "__main__":
    main()

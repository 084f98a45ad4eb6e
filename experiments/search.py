"""Fused against unfused affine search (the paper's Table 5): benchmarks/grid_search.py, at each number of bits.

There the paper's unfused search is what torch does candidate by candidate, and ours the de-duplicated search in C++ or
Triton."""

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from common.machine import ROOT
from measure.whole_model import Bench, Measurement, Task


def tasks(bench: Bench) -> Iterator[Task]:
    for bits in (4, 3, 2):
        for group in (0, 128):
            head = {
                "benchmark": "search",
                "size": bench.size.name,
                "bits": bits,
                "group": group,
                "device": bench.size.device,
            }
            yield Measurement(head, lambda b=bits, g=group: measured(b, g))


def measured(bits: int, group: int) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "benchmarks" / "grid_search.py"), "--bits", str(bits), "--group", str(group)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return {
        name: value
        for name, value in found.items()
        if name not in ("benchmark", "command", "versions", "machine", "date")
    }

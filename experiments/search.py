"""How much does the fused affine search save at each number of bits (the paper's Table 5)?

The measurement is benchmarks/grid_search.py: the paper's unfused search in torch, candidate by candidate, beside ours,
de-duplicated in C++ or Triton.
"""

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
            yield Measurement(head, lambda b=bits, g=group: measure(b, g))


def measure(bits: int, group: int) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "benchmarks" / "grid_search.py"), "--bits", str(bits), "--group", str(group)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return {
        name: value
        for name, value in found.items()
        if name not in ("benchmark", "command", "versions", "machine", "date")
    }

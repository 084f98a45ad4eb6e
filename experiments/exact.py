"""LeanQuant-Exact on an encoder (the paper's BERT table): benchmarks/encoder.py, a run a line, F1 on SQuAD's questions.

The model is what benchmarks/squad_finetune.py trains: MiniLM with a span head.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from encoder import RUNS
from sizes import ROOT
from whole import Bench, Measurement, Task


def tasks(bench: Bench) -> Iterator[Task]:
    if bench.size.squad is None:
        return
    for run in RUNS.split(","):
        scheme, _, kind = run.partition(":")
        head = {"benchmark": "exact", "size": bench.size.name, "model": bench.size.squad.name, "scheme": scheme, "variant": kind or "paper"}
        yield Measurement(head, lambda run=run: measured(bench.size.squad, run, bench.threads))


def measured(model: Path, run: str, threads: int) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "benchmarks" / "encoder.py"), str(model), "--schemes", run, "--threads", str(threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return {name: value for name, value in found.items() if name not in ("command", "versions", "machine", "date")} | {
        "method": found["variant"]
    }

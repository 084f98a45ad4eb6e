"""Is LeanQuant-Exact worth its time on an encoder (the paper's BERT table)? F1 on SQuAD's questions.

The runs are those of benchmarks/encoder.py, one line each. The model is what benchmarks/squad_finetune.py trains:
MiniLM with a span head.
"""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from encoder import LENGTH, RUNS, SAMPLES, Encoder, recipe_of
from measure.whole_model import Bench, Measurement, Task


def tasks(bench: Bench) -> Iterator[Task]:
    if bench.size.squad is None:
        return
    for run in RUNS.split(","):
        scheme, _, kind = run.partition(":")
        head = {
            "benchmark": "exact",
            "size": bench.size.name,
            "model": bench.size.squad.name,
            "scheme": scheme,
            "variant": kind or "paper",
        }
        yield Measurement(head, lambda run=run: measure(bench, bench.size.squad, run))


def measure(bench: Bench, model: Path, run: str) -> dict[str, Any]:
    encoder = open_encoder(bench, model)
    found = encoder.line(*recipe_of(run, encoder.work))
    return found | {"method": found["variant"]}


@cache
def open_encoder(bench: Bench, model: Path) -> Encoder:
    """The model and its own answers, made once for all lines."""
    folder = bench.folder / "encoder"
    folder.mkdir()
    return Encoder(model, SAMPLES, LENGTH, folder, bench.threads)

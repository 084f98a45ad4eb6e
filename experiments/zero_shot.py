"""What is the zero-shot accuracy by bits and method (the paper's Table 1), on lm-evaluation-harness's tasks?

Whole rows, as in the paper, and the original in the same table. The harness comes with ``leangrid[tasks]``. --tasks-dir
holds its yaml and documents where there is no network (benchmarks/local_tasks.py makes them from the published files).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accuracy import measure_accuracy
from leangrid.evaluation import Tasks
from measure.methods import METHODS
from measure.sizes import Subject
from measure.whole_model import Bench, Measurement, Task


def tasks(bench: Bench) -> Iterator[Task]:
    for subject in bench.causal():
        if not subject.tasks:
            continue
        head = {
            "benchmark": "zero_shot",
            "size": bench.size.name,
            "model": subject.name,
            "variant": "original",
            "method": "original",
            "base": {"tasks": list(subject.tasks), "documents": subject.documents},
        }
        yield Measurement(head, lambda subject=subject: measure_tasks(bench, subject, bench.original(subject).source))
        for bits in subject.bits:
            for method, (scheme, fields) in METHODS.items():
                whole = bench.whole(
                    "zero_shot", subject, scheme.format(bits=bits), {"method": method, "bits": bits}, **fields
                )
                yield Measurement(
                    whole.head | {"base": head["base"]}, lambda whole=whole: measure(bench, whole.subject, whole)
                )


def measure(bench: Bench, subject: Subject, whole: Any) -> dict[str, Any]:
    result = whole.quantized()
    return measure_tasks(bench, subject, whole.out) | {"bits_per_weight": result["bits_per_weight"]}


def measure_tasks(bench: Bench, subject: Subject, model: Path) -> dict[str, Any]:
    """The figures of benchmarks/accuracy.py, on the first documents of each task."""
    return measure_accuracy(
        model, Tasks(subject.tasks, directory=bench.size.tasks, limit=subject.documents), bench.size.device
    )

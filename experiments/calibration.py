"""How much calibration text, and which? KL and perplexity of the defaults at 4 bits."""

from collections.abc import Iterator
from pathlib import Path

from measure.whole_model import Bench, Task, with_calibration

SCHEME = "NU4"


def tasks(bench: Bench) -> Iterator[Task]:
    for subject in bench.causal():
        for samples in sorted({*subject.sample_counts, subject.samples}):
            label = {"variant": "size", "row": f"{subject.name}, {samples * subject.length:,} tokens"}
            yield bench.whole("calibration", with_calibration(subject, samples=samples), SCHEME, label)
        for source in (subject.calibration, *subject.other_calibrations):
            label = {"variant": "source", "row": f"{subject.name}, {Path(source).name}"}
            yield bench.whole("calibration", with_calibration(subject, calibration=source), SCHEME, label)

"""Measurements one after another, each with its line in the results file."""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from common import lines, quantize_process
from common.machine import provenance

# The first fields of a line, "scheme" and "variant" among them, and the function that measures the others.
Tasks = Iterable[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]


def run_each(tasks: Tasks, out: Path | None) -> None:
    """Measure each task, print its line and add it to ``out``. A task that fails does not stop the others: the failures
    are listed at the end, with exit code 1."""
    failed = []
    for head, measure in tasks:
        try:
            line = head | measure() | provenance()
        except quantize_process.Failed as error:
            failed.append(f"{head['variant']} {error}")
            continue
        lines.show(line, out)
    if failed:
        sys.exit("\n".join(failed))

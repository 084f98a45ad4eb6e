"""Sum of loss errors: tr(E H E^T)/2 over all layers, ours beside min-max GPTQ and rounding on the same Hessians
(records.jsonl).

The paper's procedure, so that the grid is all that differs: whole rows, p = 4, no correction, no refit, no guard.
"""

from collections.abc import Iterator

from common.variants import KNOWN
from measure.whole_model import Bench, Task


def tasks(bench: Bench) -> Iterator[Task]:
    for subject in bench.size.subjects:
        for bits in subject.bits:
            for grid in ("W{bits}A16", "NU{bits}"):
                label = {"bits": bits, "variant": "paper", "row": f"{subject.name} {grid.format(bits=bits)}"}
                yield bench.whole("losses", subject, grid.format(bits=bits), label, **KNOWN["paper"])

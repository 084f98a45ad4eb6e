"""How large is the sum of the loss errors, tr(E H E^T)/2 over all layers, beside min-max GPTQ and rounding?

All three are on the same Hessians (records.jsonl). The runs follow the paper's procedure, so that only the grid
differs: whole rows, p = 4, no correction, no refit, no guard.
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

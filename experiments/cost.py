"""What does quantizing to 4 bits cost? Seconds by stage, CPU seconds, peak memory (the paper's Tables 3 and 5).

Run it alone on an idle machine.
"""

from collections.abc import Iterator
from typing import Any

from measure.methods import METHODS
from measure.whole_model import Bench, Measurement, Task, WholeModel

_SHOWN = ("layers", "seconds", "cpu_seconds", "peak_ram_bytes", "peak_gpu_bytes", "kernels", "bits_per_weight")


def tasks(bench: Bench) -> Iterator[Task]:
    for subject in bench.causal():
        for method, (scheme, fields) in METHODS.items():
            whole = bench.whole("cost", subject, scheme.format(bits=4), {"method": method, "bits": 4}, **fields)
            yield Measurement(whole.head | {"threads": bench.threads}, lambda whole=whole: measure(whole))


def measure(whole: WholeModel) -> dict[str, Any]:
    """One run in a process of its own. Nothing is evaluated."""
    result = whole.quantized()
    return {name: result[name] for name in _SHOWN}

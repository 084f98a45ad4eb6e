"""What does it cost to look at a large model before any weight is read? Processor seconds and memory, by step.

    python benchmarks/plan_cost.py --out benchmarks/results/plan_cost.jsonl
    python benchmarks/plan_cost.py --models tiny-moe        # a small one, to test the script

A checkpoint with whole headers and no numbers is written for each model (common/headers_only.py). Each step runs in a
process of its own on one thread, and is measured by the processor time that it uses, since other work on the machine
changes that less than the time on the clock; it runs --repeats times, of which the fastest counts. "import": torch,
transformers and leangrid. "open": index and headers. "discovery": what the model is made of. "skeleton": discovery
within, and which stored tensor is which. "imported": all that the command ``leangrid plan`` does once the first of
these is done. "plan": the whole command. Memory is the peak of the process over what it had when the step began; that
of "import" and "plan" is the peak itself. "loop_seconds" is the processor time of a fixed loop, to compare machines and
how busy they were. One JSON line for each model.
"""

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common.environment import threads_environment
from common.quantize_process import cpu_seconds, own_peak

STEPS = ("import", "open", "discovery", "skeleton", "imported")
_DEVICE = "8x141GB"
_MB = 1e6


def run_step(step: str, source: Path) -> dict[str, Any]:
    """Seconds and memory of one step, in this process, which has done nothing yet."""
    begin = cpu_seconds()
    from leangrid.machine.memory import resident_bytes, without_garbage_collection

    with without_garbage_collection():  # as the command does
        import leangrid.planning.plan  # noqa: F401  # all that the command imports
        from leangrid.models.entry import find_entry
        from leangrid.models.model_class import build_empty, read_model_config, with_experts_apart
        from leangrid.models.skeleton import Skeleton
        from leangrid.storage.source import open_source

        if step == "import":
            return {"seconds": cpu_seconds() - begin, "megabytes": (own_peak() or 0) / _MB}
        if step == "imported":
            return _command(source)
        checkpoint = None if step == "open" else open_source(source)
        model: Any = None
        if checkpoint is not None and step == "discovery":
            model = with_experts_apart(build_empty(read_model_config(checkpoint)), linears=False)
        held, begin = resident_bytes(), cpu_seconds()
        if checkpoint is None:
            found = {"tensors": len(open_source(source).tensors)}
        elif model is not None:
            base = getattr(model, model.base_model_prefix, model)
            found = {"blocks": len(find_entry(model, base)[1].blocks)}
        else:
            found = {"linears": len(Skeleton(checkpoint).all_linear_names())}
        used = cpu_seconds() - begin
    return {"seconds": used, "megabytes": max(0, (own_peak() or 0) - held) / _MB} | found


def _command(source: Path) -> dict[str, Any]:
    """Seconds and memory of the command in this process, with its output thrown away."""
    from leangrid.cli.app import main as command
    from leangrid.machine.memory import resident_bytes

    sys.argv = ["leangrid", "plan", str(source), "--device", _DEVICE]
    held, begin = resident_bytes(), cpu_seconds()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        command()
    return {"seconds": cpu_seconds() - begin, "megabytes": max(0, (own_peak() or 0) - held) / _MB}


def measure(model: str, folder: Path, repeats: int) -> dict[str, Any]:
    """The fields of the line of one model."""
    from common.headers_only import CONFIGS, write

    source = write(folder / model, CONFIGS[model])
    environment = os.environ | threads_environment(1)
    line: dict[str, Any] = {"seconds": {}, "megabytes": {}, "loop_seconds": round(_loop(), 3)}
    for step in STEPS:
        command = [sys.executable, __file__, "--step", step, str(source)]
        found = _fastest([json.loads(_printed(command, environment)) for _ in range(repeats)])
        line["seconds"][step], line["megabytes"][step] = round(found.pop("seconds"), 2), round(found.pop("megabytes"))
        line |= found
    program = "import resource, subprocess, sys; done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL); "
    program += "u = resource.getrusage(resource.RUSAGE_CHILDREN); print(u.ru_utime + u.ru_stime, u.ru_maxrss * 1024); "
    program += "sys.exit(done.returncode)"
    plan = [sys.executable, "-m", "leangrid", "plan", str(source), "--device", _DEVICE]
    whole = [_printed([sys.executable, "-c", program, *plan], environment).split() for _ in range(repeats)]
    seconds, peak = min(tuple(map(float, one)) for one in whole)
    line["seconds"]["plan"], line["megabytes"]["plan"] = round(seconds, 2), round(peak / _MB)
    return line


def _printed(command: list[str], environment: dict[str, str]) -> str:
    """The last line that the command printed."""
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.splitlines()[-1]


def _fastest(runs: list[dict[str, Any]]) -> dict[str, Any]:
    return min(runs, key=lambda run: run["seconds"])


def _loop() -> float:
    begin, total = time.process_time(), 0
    for number in range(5_000_000):
        total += number & 3
    return time.process_time() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", help="those of common/headers_only.py; all but the tiny one by default")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="results file; a line of the same measurement is replaced")
    parser.add_argument("--step", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        print(json.dumps(run_step(options.step[0], Path(options.step[1]))))
        return
    from common import lines
    from common.headers_only import CONFIGS
    from common.machine import provenance

    for model in options.models or [name for name in CONFIGS if name != "tiny-moe"]:
        with tempfile.TemporaryDirectory() as temporary:
            found = measure(model, Path(temporary), options.repeats)
        line = (
            {"benchmark": "plan_cost", "model": model, "threads": 1, "repeats": options.repeats} | found | provenance()
        )
        lines.show(line, options.out)


if __name__ == "__main__":
    main()

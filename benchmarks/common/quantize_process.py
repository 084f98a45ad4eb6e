"""One quantization in a process of its own, so that its peak memory is its own.

The process reads a JSON job from stdin and prints the result as JSON on stdout. The job: {"source", "out", "recipe":
{...}, "windows": FILE.safetensors, "threads": n or null, "device"}.
"""

import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Failed(RuntimeError):
    """One measurement could not be made: the process did not finish (its messages are on stderr), or its result cannot
    be measured."""


def quantize(
    source: Path,
    out: Path,
    recipe: dict[str, Any],
    windows: Path,
    threads: int | None = None,
    device: str = "cpu",
    program: Sequence[str] = (__file__,),
) -> dict[str, Any]:
    """Quantize in a process of its own and return what ``leangrid quantize --json`` prints. Its progress is shown on
    stderr.

    ``program`` is the script that runs, with its arguments; another one must end in ``main`` of this file. Failed is
    raised where the process ends with an error.
    """
    job = {
        "source": str(source),
        "out": str(out),
        "recipe": recipe,
        "windows": str(windows),
        "threads": threads,
        "device": device,
    }
    done = subprocess.run(
        [sys.executable, *program], input=json.dumps(job), stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise Failed(f"{recipe['scheme']}: the quantizing process ended with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def own_peak() -> int | None:
    """The largest resident size of this process in bytes, since its program began; None where the system does not say.
    (getrusage's ru_maxrss would include the process that started us: Linux carries it through exec.)"""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="ascii", errors="replace").splitlines() if status.is_file() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)


def cpu_seconds() -> float:
    """User and system seconds of this process and its finished children."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def main() -> None:
    import leangrid
    from leangrid.cli.progress_bar import Terminal
    from leangrid.errors import LeangridError
    from leangrid.storage import safetensors

    job = json.load(sys.stdin)
    windows = safetensors.load(Path(job["windows"]))["windows"]
    begin = cpu_seconds()
    try:
        with Terminal() as terminal:
            result = leangrid.quantize(
                job["source"],
                job["out"],
                leangrid.Recipe(**job["recipe"]),
                windows=windows,
                threads=job["threads"],
                device=job["device"],
                progress=terminal,
            )
    except LeangridError as error:
        raise SystemExit(f"leangrid: {error}") from error
    used = {"cpu_seconds": round(cpu_seconds() - begin, 3), "process_cpu_seconds": round(cpu_seconds(), 3)}
    print(json.dumps(result.to_dict() | used | {"peak_ram_bytes": own_peak() or result.peak_ram_bytes}))


if __name__ == "__main__":
    main()

"""One quantization in a process of its own, so that its peak memory is its own: a JSON job on stdin, the result's JSON on stdout.

quality.py and quantize_time.py start it. The job: {"source", "out", "recipe": {...}, "windows": FILE.safetensors, "threads": n or null}.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def quantize(source: Path, out: Path, recipe: dict[str, Any], windows: Path, threads: int | None = None) -> dict[str, Any]:
    """Start this file and return what ``leangrid quantize --json`` would print. The child's progress goes to our stderr."""
    job = {"source": str(source), "out": str(out), "recipe": recipe, "windows": str(windows), "threads": threads}
    done = subprocess.run([sys.executable, __file__], input=json.dumps(job), stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{recipe['scheme']}: the quantizing process ended with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    import leangrid
    from leangrid.errors import LeangridError
    from leangrid.report.terminal import Terminal
    from leangrid.storage import safetensors

    job = json.load(sys.stdin)
    windows = safetensors.load(Path(job["windows"]))["windows"]
    try:
        with Terminal() as terminal:
            result = leangrid.quantize(job["source"], job["out"], leangrid.Recipe.build(**job["recipe"]), windows=windows,
                                       threads=job["threads"], progress=terminal)  # fmt: skip
    except LeangridError as error:
        raise SystemExit(f"leangrid: {error}") from error
    print(json.dumps(result.to_json()))


if __name__ == "__main__":
    main()

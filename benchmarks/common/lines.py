"""Result files: one JSON object a line. A measurement that is made again replaces its line, any other is appended.

As a script it prints the lines of its standard input and adds those that are JSON to the file it is given:

    python benchmarks/kernels_cpu.py | python benchmarks/common/lines.py benchmarks/results/kernels_cpu.jsonl
"""

import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# What a measurement is of. Two lines that agree in all of these are the same measurement, run twice.
_IDENTITY = (
    "benchmark",
    "engine",
    "model",
    "scheme",
    "format",
    "variant",
    "stage",
    "variable",
    "base",
    "rows",
    "cols",
    "bits",
    "steps",
    "group",
    "device",
    "recipe",
    "windows_sha256",
    "text",
    "sha256_of_text",
    "length",
    "windows",
    "threads",
)


def read(path: Path) -> list[dict[str, Any]]:
    """All lines of ``path``; an empty list where there is no such file."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def identity(line: Mapping[str, Any]) -> str:
    """A text that is equal for two runs of one measurement on one kind of processor (its name and instruction sets; the
    name alone does not tell processors apart)."""
    return json.dumps([line.get(name) for name in _IDENTITY] + processor(line), sort_keys=True)


def processor(line: Mapping[str, Any]) -> list[Any]:
    """The processor's name and instruction sets, without the number of cores."""
    machine = line.get("machine", {})
    return [machine.get("cpu"), machine.get("isa")]


def text(line: Mapping[str, Any]) -> str:
    """``line`` as strict JSON. A figure that is not finite becomes null."""
    return json.dumps({name: _plain(value) for name, value in line.items()}, allow_nan=False, ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def add(path: Path, line: Mapping[str, Any]) -> None:
    """Replace the earlier line of the same measurement with ``line``, or append it. The file is replaced at once, so
    that a reader never sees half of it."""
    kept, fresh = read(path), dict(line)
    places = [index for index, old in enumerate(kept) if identity(old) == identity(fresh)]
    for index in places[:1]:
        kept[index] = fresh
    kept = kept if places else [*kept, fresh]
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text("".join(text(item) + "\n" for item in kept), encoding="utf-8")
    os.replace(part, path)


def show(line: Mapping[str, Any], path: Path | None) -> None:
    """Print ``line`` as one line of JSON, and add it to the results file ``path`` where one is given."""
    print(text(line), flush=True)
    if path is not None:
        add(path, line)


def main() -> None:
    """Print every line of the standard input, and add those that are JSON objects to the results file."""
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    for line in sys.stdin:
        print(line, end="", flush=True)
        if line.startswith("{"):
            add(Path(sys.argv[1]), json.loads(line))


if __name__ == "__main__":
    main()

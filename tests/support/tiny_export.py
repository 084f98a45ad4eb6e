"""``python tiny_export.py MODEL WORK SPREAD LAST``: exports that are killed at one failpoint each, and the same export
again.

After a kill the output must be absent or complete, and the second export must give the bytes of an undisturbed one.
SPREAD failpoints over the whole of it are tried, and each of the LAST. Forked children: importing torch for each would
take minutes. Prints one JSON line."""

import json
import os
import shutil
import sys
from functools import partial
from pathlib import Path

import torch
from forked import status_of
from tiny_run import digest

from leangrid.exporters.export import export
from leangrid.storage import failpoints
from leangrid.storage.journal import partial_of
from leangrid.storage.manifest import list_differences


def passages(model: Path, out: Path) -> int:
    """How many failpoints an export passes."""
    os.environ["LEANGRID_FAILPOINT"] = "*:1000000000"
    export(model, out, "gptq")
    del os.environ["LEANGRID_FAILPOINT"]
    count = failpoints._passages
    failpoints.reset()
    return count


def main(model: Path, work: Path, spread: int, last: int) -> None:
    total = passages(model, work / "expected")
    expected, problems, killed, published = digest(work / "expected"), [], 0, 0
    for n in sorted({*range(1, total + 1, max(1, total // spread)), *range(total - last + 1, total + 1)}):
        out = work / f"out{n}"
        exported = partial(export, model, out, "gptq")
        killed += status_of(exported, f"*:{n}") == -9
        if out.exists():
            published += 1
            problems += [f"{n}: {difference}" for difference in list_differences(out)]
        problems += [f"{n}: a config.json outside publish" for _ in partial_of(out).glob("config.json")]
        again = status_of(exported)
        if again not in (0, 2 if out.exists() and published else 0) or digest(out) != expected:
            problems.append(f"{n}: the second export ended with {again}")
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(partial_of(out), ignore_errors=True)
    print(json.dumps({"passages": total, "killed": killed, "published_then_killed": published, "problems": problems}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))

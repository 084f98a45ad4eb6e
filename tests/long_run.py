"""``python long_run.py WORK [BLOCKS] [KILLS] [SEED]``: a long run's bad days in small; prints one JSON line.

A Llama of 126 tiny blocks, its states in mapped files of a state directory, is killed, resumed, killed while the disk is slow, stopped by
a state directory that is full, and resumed again, until it ends: with the bytes of an undisturbed run whose states were in memory.
Each trouble is a row of TROUBLES: what happens to one attempt, and the exit status by which it must end; a rank that dies is one more
row. One process that forks, as random_kills.py.
"""

import errno
import json
import os
import random
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import tiny_models
import tiny_run
from forked import status_of
from leangrid.pipeline import quantize
from leangrid.placement import Placement
from leangrid.recipe import Recipe
from leangrid.report.views import TIMED
from leangrid.storage import files, safetensors, source
from leangrid.storage.writer import verify

IN_MEMORY = Placement(2, replay=True, host_streams=True)
ON_DISK = Placement(2, replay=True, host_streams=True, disk_streams=True)
KILLED, REFUSED = -9, 2  # of forked.status_of: an OutputError is a refusal there, whatever its own exit code
SLOW_DISK = 4e6  # bytes/s

Job = Callable[[], object]


def undisturbed(job: Job) -> None:
    job()


def slow_disk(job: Job) -> None:
    """Every tensor of the source comes at SLOW_DISK."""
    read = safetensors.read_tensor

    def slowly(file: Any, info: safetensors.TensorInfo) -> torch.Tensor:
        time.sleep(info.nbytes / SLOW_DISK)
        return read(file, info)

    source.read_tensor = slowly
    job()


def full_disk(job: Job) -> None:
    """After 40 reservations the state directory has no space left."""

    class Full:
        left = 40

        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

        def posix_fallocate(self, *given: int) -> None:
            self.left -= 1
            if self.left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.posix_fallocate(*given)

    files.os = Full()  # pyright: ignore[reportAttributeAccessIssue]
    job()


# What happens to an attempt, whether it is killed after a random time, and how it must end.
TROUBLES: dict[str, tuple[Callable[[Job], None], bool, int]] = {
    "killed": (undisturbed, True, KILLED),
    "killed on a slow disk": (slow_disk, True, KILLED),
    "state directory full": (full_disk, False, REFUSED),
}


def contents(out: Path) -> dict[str, str]:
    return {name: sha256 for name, sha256 in tiny_run.digest(out).items() if name not in TIMED}


def main(work: Path, blocks: int = 126, kills: int = 6, seed: int = 0) -> dict[str, object]:
    model, windows = tiny_models.synthetic(work / "source", blocks=blocks), tiny_models.tokens(4, 32)
    out, states, chance = work / "out", work / "states", random.Random(seed)
    recipe = Recipe(scheme="W4A16_G32")

    def job(where: Path, placement: Placement) -> object:
        return quantize(model, where, recipe, windows=windows, placement=placement, state_dir=states)

    started = time.perf_counter()
    status = status_of(partial(job, work / "expected", IN_MEMORY))
    duration = time.perf_counter() - started
    problems, committed = [f"the undisturbed run ended with {status}"] if status else [], []
    ends = list(TROUBLES.items())
    for attempt in range(kills):
        name, (trouble, dies, expected) = ends[attempt % len(ends)]
        delay = chance.uniform(0.1, 0.3) * duration if dies else None
        status = status_of(partial(trouble, partial(job, out, ON_DISK)), delay=delay)
        committed.append(len(list((work / "out.partial" / "blocks").glob("*.json"))))
        if status != expected:
            problems.append(f"{name}: ended with {status}, not {expected}")
        if out.exists():
            problems.append(f"{name}: a result is there already")
    status = status_of(partial(slow_disk, partial(job, out, ON_DISK)))
    problems += [f"the last attempt ended with {status}"] if status else verify(out)
    if contents(out) != contents(work / "expected"):
        problems.append("other bytes")
    problems += [f"left behind: {path.name}" for path in states.rglob("*.*")]
    return {"blocks": blocks, "seconds": round(duration, 1), "committed": committed, "problems": problems}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(Path(sys.argv[1]), *map(int, sys.argv[2:]))))

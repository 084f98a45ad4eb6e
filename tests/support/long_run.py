"""``python long_run.py WORK [BLOCKS] [ATTEMPTS] [SEED]``: a long run's bad days in small; prints one JSON line.

A Llama of 126 tiny blocks, on two ranks, their states in mapped files of a state directory: one rank is killed, then
the other, or while the disk is slow, or the state directory is full, each time all end and the same run is resumed,
until it ends: with the bytes of an undisturbed run of two ranks whose states were in memory. Each trouble is a row of
TROUBLES: what happens to one attempt, and the exit statuses by which it must end. One process that forks, as
random_kills.py."""

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

import forked_ranks
import tiny_models
import tiny_run
import torch

from leangrid.planning.placement import Placement
from leangrid.recipe import Recipe
from leangrid.report.views import TIMED
from leangrid.run.quantize import quantize
from leangrid.storage import files, safetensors, source
from leangrid.storage.manifest import list_differences

IN_MEMORY = Placement(2, replay=True, host_streams=True)
ON_DISK = Placement(2, replay=True, host_streams=True, disk_streams=True)
RANKS, KILLED, STOPPED = 2, -9, 3
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
    """After 16 reservations the state directory has no space left."""

    class Full:
        left = 16

        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

        def posix_fallocate(self, *given: int) -> None:
            self.left -= 1
            if self.left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.posix_fallocate(*given)

    files.os = Full()  # pyright: ignore[reportAttributeAccessIssue]
    job()


# What happens to an attempt, which rank is killed some blocks later, and how both must end.
TROUBLES: dict[str, tuple[Callable[[Job], None], int | None, list[int]]] = {
    "rank 0 killed": (undisturbed, 0, [KILLED, STOPPED]),
    "a rank killed": (undisturbed, 1, [STOPPED, KILLED]),
    "killed on a slow disk": (slow_disk, 0, [KILLED, STOPPED]),
    "state directory full": (full_disk, None, [STOPPED, STOPPED]),
}


def contents(out: Path) -> dict[str, str]:
    return {name: sha256 for name, sha256 in tiny_run.digest(out).items() if name not in TIMED}


def main(work: Path, blocks: int = 126, attempts: int = 6, seed: int = 0) -> dict[str, object]:
    model, windows = tiny_models.synthetic(work / "source", blocks=blocks), tiny_models.tokens(4, 32)
    out, states, chance = work / "out", work / "states", random.Random(seed)
    recipe = Recipe(scheme="W4A16_G32")

    def attempt(
        trouble: Callable[[Job], None],
        where: Path,
        placement: Placement,
        kill: tuple[int, Callable[[], bool]] | None = None,
    ) -> list[int]:
        job = partial(quantize, model, where, recipe, windows=windows, placement=placement, state_dir=states)
        ended = forked_ranks.run(RANKS, forked_ranks.as_command(lambda rank: trouble(job)), kill=kill, within=600)
        print(
            *(f"rank {rank}: {one.said.strip()}" for rank, one in enumerate(ended) if one.said.strip()),
            sep="\n",
            file=sys.stderr,
        )
        return [one.status for one in ended]

    def committed() -> int:
        return len(list((work / "out.partial" / "blocks").glob("*.json")))

    def reached(target: int) -> bool:
        """Whether ``target`` blocks are there; a part of one later."""
        there = committed() >= target
        time.sleep(chance.uniform(0, 0.2) if there else 0)
        return there

    started = time.perf_counter()
    statuses = attempt(undisturbed, work / "expected", IN_MEMORY)
    duration = time.perf_counter() - started
    problems, kept = [f"the undisturbed run ended with {statuses}"] if any(statuses) else [], [0]
    ends = list(TROUBLES.items())
    for number in range(attempts):
        name, (trouble, dies, expected) = ends[number % len(ends)]
        target = kept[-1] + chance.randint(1, blocks // attempts - 1)
        kill = None if dies is None else (dies, partial(reached, target))
        statuses = attempt(trouble, out, ON_DISK, kill)
        kept.append(committed())
        if statuses != expected:
            problems.append(f"{name}: ended with {statuses}, not {expected}")
        if out.exists():
            problems.append(f"{name}: a result is there already")
    statuses = attempt(slow_disk, out, ON_DISK)
    problems += [f"the last attempt ended with {statuses}"] if any(statuses) else list_differences(out)
    if contents(out) != contents(work / "expected"):
        problems.append("other bytes")
    problems += [f"left behind: {path.name}" for path in states.rglob("*.*")]
    return {
        "blocks": blocks,
        "ranks": RANKS,
        "seconds": round(duration, 1),
        "committed": kept[1:],
        "problems": problems,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(Path(sys.argv[1]), *map(int, sys.argv[2:]))))

"""``python random_kills.py KIND WORK COUNT SEED``: SIGKILL after a random time, until COUNT kills have hit; prints one
JSON line.

KIND is ``storage`` (tiny_run.py: a run's life on disk without its mathematics) or ``quantize`` (the whole thing on a
tiny model). After each kill OUT must be absent or complete; a run that was killed up to three times must then end with
the bytes of an undisturbed one. One process that forks: each child starts with everything imported."""

import json
import random
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import tiny_run
import torch
from forked import status_of

from leangrid.report.views import TIMED
from leangrid.storage.manifest import list_differences

Job = Callable[[Path], object]


def jobs(kind: str, work: Path) -> Job:
    """The run of ``kind``, as a function of its output."""
    if kind == "storage":
        source = tiny_run.write_source(work / "source")
        return lambda out: tiny_run.run(source, out)
    import tiny_models  # transformers takes seconds, and only this kind needs it

    from leangrid.recipe import Recipe
    from leangrid.run.quantize import quantize

    source, windows = tiny_models.save("llama2", work / "source"), tiny_models.tokens(2, 16)
    return lambda out: quantize(source, out, Recipe(scheme="W4A16_G32"), windows=windows)


def contents(out: Path, kind: str) -> dict[str, str]:
    return {name: sha256 for name, sha256 in tiny_run.digest(out).items() if kind == "storage" or name not in TIMED}


def main(kind: str, work: Path, count: int, seed: int) -> dict[str, object]:
    job, chance, problems = jobs(kind, work), random.Random(seed), []
    job(work / "warm")
    started = time.perf_counter()
    status_of(lambda: job(work / "expected"))
    duration = time.perf_counter() - started
    expected, hits, early, trial = contents(work / "expected", kind), 0, 0, 0
    while hits < count:
        trial += 1
        if trial > 20 * count:
            raise RuntimeError(f"{early} of {early + hits} kills came before anything was written")
        out, status = work / f"out{trial}", -9
        for _ in range(chance.randint(1, 3)):
            status = status_of(partial(job, out), delay=chance.uniform(0, 1.1 * duration))
            something = out.exists() or out.with_name(f"{out.name}.partial").exists()
            hits += status == -9 and something
            early += status == -9 and not something  # before there was anything to damage: no hit
            if out.exists():
                problems += [f"{trial}: {difference}" for difference in list_differences(out)]
                break
        journal = out.with_name(f"{out.name}.partial")
        if not out.exists() or (journal / "sealed.json").exists():
            status = status_of(partial(job, out))
        if status not in (0, -9) or contents(out, kind) != expected:
            problems.append(f"{trial}: ended with {status}, or with other bytes")
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(journal, ignore_errors=True)
    return {"kills": hits, "before_anything": early, "runs": trial, "problems": problems}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))))

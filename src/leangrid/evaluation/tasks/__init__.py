"""Tasks on a model: those of lm-evaluation-harness by their names, and our own: ``sts`` and ``squad`` for encoders,
``mt_bench`` with a judge."""

import time
from collections.abc import Callable
from typing import Any

import torch

from leangrid.errors import LeangridError, TaskError
from leangrid.evaluation.opened import Opened
from leangrid.evaluation.tasks import harness, mt_bench, squad, sts
from leangrid.evaluation.tasks.job import Job, Part, Results, Tasks
from leangrid.evaluation.tasks.judge import Unrated
from leangrid.evaluation.tasks.saved_results import SavedResults
from leangrid.progress import Event, Progress

OWN: dict[str, Callable[[Tasks], Job]] = {"sts": sts.make_job, "squad": squad.make_job, "mt_bench": mt_bench.make_job}


def prepare_tasks(tasks: Tasks) -> list[Job]:
    """Read the data of every named task, in the order given; TaskError for what is unknown or missing, before a model
    is opened."""
    others = [name for name in tasks.names if name not in OWN]
    theirs = harness.make_jobs(others, tasks) if others else {}
    return [job for name in tasks.names for job in ([OWN[name](tasks)] if name in OWN else theirs[name])]


@torch.no_grad()
def run_tasks(subject: Opened, jobs: list[Job], saved: SavedResults, say: Progress) -> dict[str, dict[str, Any]]:
    """The figures of every job by its name; parts whose results are saved are not run again.

    A job that fails has {"error": sentence}; the others go on."""
    missing = {part.name for job in jobs for part in job.parts if saved.get(part.name, part.conditions) is None}
    for job in jobs:
        if job.notice is not None:
            say(Event("notice", message=job.notice(missing)))
    total, done = sum(len(job.parts) for job in jobs), 0
    results: dict[str, dict[str, Any]] = {}
    for job in jobs:
        found: Results = {}
        unrated: list[str] = []
        try:
            for part in job.parts:
                done += 1
                before = "" if part.name in missing else " (kept from before)"
                say(Event("task", message=f"task {done} of {total}: {part.name}{before}"))
                try:
                    found[part.name] = _run_part(part, subject, found, saved)
                except Unrated as error:
                    unrated.append(f"{part.name}: {error}")
            if unrated:
                raise TaskError(f"{len(unrated)} of {len(job.parts)} parts failed, first {unrated[0]}", job.name)
            results[job.name] = job.figures(found)
        except LeangridError as error:
            results[job.name] = {"error": str(error)}
    return results


def _run_part(part: Part, subject: Opened, found: Results, saved: SavedResults) -> dict[str, Any]:
    """The saved result of the part, or a new one, which is saved."""
    before = saved.get(part.name, part.conditions)
    if before is not None:
        return before
    started = time.perf_counter()
    result = part.run(subject, found)
    result["seconds"] = round(time.perf_counter() - started, 1)
    saved.put(part.name, part.conditions, result)
    return result

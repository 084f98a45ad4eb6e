"""Tasks on a model: the harness's by their names, and our own: ``sts`` and ``squad`` for encoders, ``mt_bench`` with a
judge."""

import time
from collections.abc import Callable
from typing import Any

import torch

from leangrid.errors import LeangridError, TaskError
from leangrid.evaluation.opened import Opened
from leangrid.evaluation.tasks import harness, mt_bench, squad, sts
from leangrid.evaluation.tasks.job import Job, Results, Step, Tasks
from leangrid.evaluation.tasks.judge import Unrated
from leangrid.evaluation.tasks.kept import Kept
from leangrid.progress import Event, Progress

OWN: dict[str, Callable[[Tasks], Job]] = {"sts": sts.job, "squad": squad.job, "mt_bench": mt_bench.job}


def prepare(tasks: Tasks) -> list[Job]:
    """Every name with its data at hand, in the order given; TaskError for what is unknown or missing, before a model is
    opened."""
    others = [name for name in tasks.names if name not in OWN]
    theirs = harness.jobs(others, tasks) if others else {}
    return [job for name in tasks.names for job in ([OWN[name](tasks)] if name in OWN else theirs[name])]


@torch.no_grad()
def run(subject: Opened, jobs: list[Job], kept: Kept, say: Progress) -> dict[str, dict[str, Any]]:
    """Run what ``kept`` does not hold yet. A task that fails becomes {"error": sentence}; the others go on."""
    todo = {step.name for job in jobs for step in job.steps if kept.get(step.name, step.conditions) is None}
    for job in jobs:
        if job.notice is not None:
            say(Event("notice", message=job.notice(todo)))
    total, done = sum(len(job.steps) for job in jobs), 0
    results: dict[str, dict[str, Any]] = {}
    for job in jobs:
        found: Results = {}
        unrated: list[str] = []
        try:
            for step in job.steps:
                done += 1
                again = "" if step.name in todo else " (kept from before)"
                say(Event("task", message=f"task {done} of {total}: {step.name}{again}"))
                try:
                    found[step.name] = _result(step, subject, found, kept)
                except Unrated as error:
                    unrated.append(f"{step.name}: {error}")
            if unrated:
                raise TaskError(f"{len(unrated)} of {len(job.steps)} steps failed, first {unrated[0]}", job.name)
            results[job.name] = job.figures(found)
        except LeangridError as error:
            results[job.name] = {"error": str(error)}
    return results


def _result(step: Step, subject: Opened, found: Results, kept: Kept) -> dict[str, Any]:
    before = kept.get(step.name, step.conditions)
    if before is not None:
        return before
    started = time.perf_counter()
    result = step.run(subject, found)
    result["seconds"] = round(time.perf_counter() - started, 1)
    kept.put(step.name, step.conditions, result)
    return result

"""What a task is before and while it runs: its settings, its steps, and how their results become figures."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leangrid.errors import TaskError
from leangrid.evaluation.opened import Opened

JUDGE = "gpt-4o-2024-05-13"
Results = dict[str, dict[str, Any]]  # of the steps of a job that are done, by name
Runner = Callable[[Opened, Results], dict[str, Any]]


@dataclass(frozen=True)
class Tasks:
    """What to run, before anything is read.

    Attributes:
        names: the harness's own names (arc_easy, mmlu, ...), or sts, squad, mt_bench.
        directory: where their data lie; None: the hub.
        limit: documents of each task, from its start; None: all.
        batch_size: rows of one forward pass.
        out: a file that keeps each finished task; the same call with the same file goes on after the last one.
        judge_url, judge_model: who rates the answers of mt_bench.
    """

    names: tuple[str, ...]
    directory: Path | None = None
    limit: int | None = None
    batch_size: int = 16
    out: Path | None = None
    judge_url: str | None = None
    judge_model: str = JUDGE

    @classmethod
    def parse(cls, names: str, **settings: Any) -> "Tasks":
        """``arc_easy,piqa`` with what else there is; TaskError for no names, a name twice, a limit or batch below 1."""
        found = tuple(name.strip() for name in names.split(",") if name.strip())
        tasks = cls(found, **settings)
        if not found or len(set(found)) < len(found):
            raise TaskError(
                "no task is named" if not found else "a task is named twice", "--tasks", "Write --tasks arc_easy,piqa"
            )
        if tasks.batch_size < 1 or (tasks.limit is not None and tasks.limit < 1):
            raise TaskError("a limit or batch below 1", "--limit, --batch-size", "Use 1 or more")
        return tasks


@dataclass(frozen=True)
class Step:
    """One unit of work: what a stop loses at most. ``conditions`` is all that its result depends on besides the model;
    ``run`` gets the model and the results of the job's steps before it."""

    name: str
    conditions: str
    run: Runner


@dataclass(frozen=True)
class Job:
    """The steps of one name and how their results become its figures."""

    name: str
    steps: list[Step]
    figures: Callable[[Results], dict[str, Any]]
    notice: Callable[[set[str]], str] | None = (
        None  # of the names of the steps to do: what must be said before the first
    )

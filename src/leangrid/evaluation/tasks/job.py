"""What a task is: the request for it, its parts, and how the results of its parts become its figures."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leangrid.errors import TaskError
from leangrid.evaluation.opened import Opened

JUDGE = "gpt-4o-2024-05-13"
Results = dict[str, dict[str, Any]]  # by name, of the parts of a job that were run
Runner = Callable[[Opened, Results], dict[str, Any]]


@dataclass(frozen=True)
class Tasks:
    """Which tasks to run and how; nothing is read yet.

    Attributes:
        names: names of lm-evaluation-harness (arc_easy, mmlu, ...), or sts, squad, mt_bench.
        directory: where their data lie; None: the hub.
        limit: documents of each task, from its start; None: all.
        batch_size: rows of one forward pass.
        out: a file that every finished part is saved in; the same call with the same file goes on after the last one.
            None: nothing is saved.
        judge_url: the API whose model rates the answers of mt_bench; None where mt_bench is not asked for.
        judge_model: the name of that model.

    Example:
        >>> leangrid.Tasks.parse("arc_easy, piqa", limit=100).names
        ('arc_easy', 'piqa')
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
        """Read names such as ``arc_easy,piqa``; ``settings`` are the other attributes.

        Raises:
            TaskError: no name, a name twice, or a limit or batch size below 1.
        """
        found = tuple(name.strip() for name in names.split(",") if name.strip())
        tasks = cls(found, **settings)
        if not found or len(set(found)) < len(found):
            what = "no task is named" if not found else "a task is named twice"
            raise TaskError(what, "--tasks", "Write --tasks arc_easy,piqa")
        if tasks.batch_size < 1 or (tasks.limit is not None and tasks.limit < 1):
            raise TaskError("a limit or batch below 1", "--limit, --batch-size", "Use 1 or more")
        return tasks


@dataclass(frozen=True)
class Part:
    """A part of a task that is run and saved as a whole: a stopped evaluation repeats at most one.

    Attributes:
        name: unique in the evaluation.
        conditions: all that the result depends on besides the model: data, settings, versions.
        run: gets the model and the results of the earlier parts of the job, and returns this part's result.
    """

    name: str
    conditions: str
    run: Runner


@dataclass(frozen=True)
class Job:
    """One task, with its data read and ready to run.

    Attributes:
        name: what its figures are filed under.
        parts: run in this order.
        figures: turns the results of all parts into the figures of the task.
        notice: gets the names of the parts that will be run, and returns a sentence that must be said before the first;
            None: there is nothing to say.
    """

    name: str
    parts: list[Part]
    figures: Callable[[Results], dict[str, Any]]
    notice: Callable[[set[str]], str] | None = None

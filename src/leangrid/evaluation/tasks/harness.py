"""lm-evaluation-harness (Gao et al. 2021): its tasks by name or from local files, run on a model that is loaded.

Local files are the harness's own yaml with the documents beside it (``dataset_path: json``, ``dataset_kwargs:
{data_files: {test: FILE.jsonl}}``). They are read here and not by ``datasets``, which would look for them in the
working directory and keep a copy in its cache. No code comes with them (``!function``), but the harness renders their
templates outside of a sandbox: use files that you trust."""

import difflib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from leangrid.errors import TaskError, first_line
from leangrid.evaluation.opened import Opened
from leangrid.evaluation.tasks.data_files import read_json_lines
from leangrid.evaluation.tasks.job import Job, Part, Results, Tasks
from leangrid.storage.files import hash_file

_SEED = 1234  # of the few-shot examples: what the harness's own command line takes
_OFFLINE = "Without a network give a directory with the harness's yaml and .jsonl files: --tasks-dir DIR"


@dataclass(frozen=True)
class Benchmark:
    """What one name stands for in the harness.

    Attributes:
        name: the name.
        tasks: the harness's task objects, by name.
        group: the harness's group, which averages over its tasks (MMLU has 57); None for a single task.
        source: what the figures depend on: the harness's version, or the sha256 of local files.
    """

    name: str
    tasks: dict[str, Any]
    group: Any
    source: str


def find_benchmarks(names: Sequence[str], directory: Path | None) -> dict[str, list[Benchmark]]:
    """The tasks of each of these names, with their data read; nothing is run. A tag such as lambada stands for several.

    Args:
        names: names of tasks, groups or tags.
        directory: holds *.yaml and .jsonl files; None: the harness's own tasks, whose data come from the hub.

    Raises:
        TaskError: the harness is not installed, a name is unknown, a file is missing or unusable, the hub cannot be
            reached.
    """
    if find_spec("lm_eval") is None:
        raise TaskError("lm-evaluation-harness is not installed", ", ".join(names), "pip install 'leangrid[tasks]'")
    with _quiet():
        return _from_harness(names) if directory is None else _from_directory(names, directory)


def run_task(subject: Opened, task: Any, batch_size: int, limit: int | None) -> dict[str, Any]:
    """Run one task on one model.

    Args:
        subject: a decoder with its tokenizer.
        task: the harness's object.
        batch_size: rows of a forward pass.
        limit: how many documents, from the start; None: all.

    Returns:
        The harness's figures under its keys, such as "acc,none", and the number of documents as "sample_len".

    Raises:
        TaskError: the model is no decoder, or has no tokenizer; the harness failed.
    """
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    if not subject.has_lm_head or subject.tokenizer is None:
        no_head = "it has no language-model head; sts and squad are for encoders"
        lacks = "it has no tokenizer" if subject.has_lm_head else no_head
        raise TaskError(f"the model cannot run this task: {lacks}", task.config.task)
    with _quiet():
        opened: Any = HFLM  # its registry hides the arguments
        model = opened(pretrained=subject.model, tokenizer=subject.tokenizer, batch_size=batch_size)
        if os.environ.get("TQDM_DISABLE"):  # the harness shows its bars all the same
            for kind in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
                setattr(model, kind, partial(getattr(model, kind), disable_tqdm=True))
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=_SEED)
        name = task.config.task
        try:
            found: Any = evaluate(model, {"tasks": {name: task}, "groups": {}}, limit=limit, log_samples=False)  # pyright: ignore
        except Exception as error:  # of the harness, its metrics and its templates: no common base class
            what = f"the harness could not run it: {first_line(error)}"
            raise TaskError(what, name, "Look at its yaml, or take another task") from error
    return dict(found["results"][name])


def make_jobs(names: Sequence[str], tasks: Tasks) -> dict[str, list[Job]]:
    """The jobs of each name, with one part for each of the harness's tasks; errors as in ``find_benchmarks``."""
    found = find_benchmarks(names, tasks.directory)
    return {name: [_job(benchmark, tasks) for benchmark in benchmarks] for name, benchmarks in found.items()}


def _job(benchmark: Benchmark, tasks: Tasks) -> Job:
    conditions = f"{benchmark.source}, limit {tasks.limit}"
    size, limit = tasks.batch_size, tasks.limit
    parts = [Part(name, conditions, lambda subject, _, task=task: run_task(subject, task, size, limit))
             for name, task in benchmark.tasks.items()]  # fmt: skip

    def figures(found: Results) -> dict[str, Any]:
        whole = found[benchmark.name] if benchmark.group is None else average_group(benchmark, found)
        return rename_figures(whole) | {"seconds": round(sum(one["seconds"] for one in found.values()), 1)}

    return Job(benchmark.name, parts, figures)


def rename_figures(found: Mapping[str, Any]) -> dict[str, Any]:
    """The harness's keys as ours: {"acc": 0.5, "stderr": 0.01, "acc_norm": ..., "acc_norm_stderr": ..., "n": 2376}.

    "stderr" belongs to "acc", or to the first metric where there is no accuracy; None where the harness gives none.
    """
    metrics = {key.removesuffix(",none"): value for key, value in found.items() if "," in key and "_stderr," not in key}
    first = "acc" if "acc" in metrics else next(iter(metrics), "")
    shown: dict[str, Any] = {}
    for key in sorted(metrics, key=lambda name: name != first):
        name, comma, filtered = key.partition(",")
        deviation = found.get(f"{name}_stderr,{filtered if comma else 'none'}")
        shown[key] = float(metrics[key])
        shown["stderr" if key == first else f"{name}_stderr{comma}{filtered}"] = (
            None if isinstance(deviation, str | None) else float(deviation)
        )
    return shown | {"n": int(found["sample_len"])}


def average_group(benchmark: Benchmark, found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A group's figures from those of its tasks, by the harness's own rule."""
    with _quiet():
        return dict(benchmark.group.aggregate(dict(found)))


def _from_harness(names: Sequence[str]) -> dict[str, list[Benchmark]]:
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    for name in names:
        if name not in manager.task_index:
            raise _unknown(name, manager.all_tasks, "lm-evaluation-harness")
    return {name: _loaded(manager, name) for name in names}


def _loaded(manager: Any, name: str) -> list[Benchmark]:
    try:
        found = manager.load([name])
    except Exception as error:  # hub, http, datasets and yaml errors have no common base class
        raise TaskError(f"its data cannot be read: {first_line(error)}", name, _OFFLINE) from error
    if any(getattr(task, "UNSAFE_CODE", False) for task in found["tasks"].values()):
        raise TaskError(
            "it runs what the model writes as a program, which leangrid never does", name, "Take another task"
        )
    group, source = found["groups"].get(name), f"lm_eval {version('lm_eval')}"
    if group is not None:
        return [Benchmark(name, found["tasks"], group, source)]
    return [Benchmark(each, {each: task}, None, source) for each, task in found["tasks"].items()]


def _from_directory(names: Sequence[str], directory: Path) -> dict[str, list[Benchmark]]:
    if not directory.is_dir():
        raise TaskError(
            "there is no such directory", directory, "Give one with .yaml and .jsonl files: --tasks-dir DIR"
        )
    configs = {config["task"]: (path, config) for path, config in _configs(directory)}
    for name in names:
        if name not in configs:
            raise _unknown(name, list(configs), str(directory))
    return {name: [_from_file(name, *configs[name])] for name in names}


def _configs(directory: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    import yaml

    for path in sorted(directory.glob("*.yaml")):
        try:
            config = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, OSError, ValueError) as error:
            way_out = "It must be plain yaml: no !function, no include"
            raise TaskError(f"the task file cannot be read: {first_line(error)}", path, way_out) from error
        if not isinstance(config, dict) or not isinstance(config.get("task"), str) or "include" in config:
            raise TaskError("the task file describes no single task", path, "It needs task: NAME, and no include")
        yield path, config


def _from_file(name: str, path: Path, config: dict[str, Any]) -> Benchmark:
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    files = (config.pop("dataset_kwargs", None) or {}).get("data_files")
    if config.get("dataset_path") != "json" or not isinstance(files, dict) or not files:
        raise TaskError(
            "the task file names no local data",
            path,
            "Write dataset_path: json and dataset_kwargs: {data_files: {test: FILE}}",
        )
    read, splits = [path], {}
    for split, file in files.items():
        data = path.parent / str(file)
        if not data.is_file():
            raise TaskError(f"the data of task {name} are missing", data, f"{path.name} asks for them")
        read.append(data)
        splits[split] = read_json_lines(data)
    try:
        config["custom_dataset"] = lambda **_: {split: Dataset.from_list(rows) for split, rows in splits.items()}
        task = ConfigurableTask(config=config)
    except Exception as error:  # of the harness, of templates and of pyarrow: no common base class
        raise TaskError(
            f"the task cannot be made from its file: {first_line(error)}", path, "Compare its fields with its data"
        ) from error
    return Benchmark(name, {name: task}, None, f"lm_eval {version('lm_eval')}, sha256 {hash_file(*read)}")


def _unknown(name: str, known: Sequence[str], where: str) -> TaskError:
    near = difflib.get_close_matches(name, known, 4, 0.5) or sorted(known)[:8]
    return TaskError(
        f"there is no task '{name}'", where, f"Near to it: {', '.join(near)}" if near else "It holds no .yaml file"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's remarks about models that it did not open itself."""
    log = logging.getLogger("lm_eval")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)

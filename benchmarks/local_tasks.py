"""Makes a directory for ``leangrid eval --tasks-dir`` from published task files, for machines without a network.

    python benchmarks/local_tasks.py DATA OUT

DATA holds any of: hellaswag*.jsonl (Zellers et al.'s file), piqa*.jsonl with piqa*labels.lst (Bisk et al.'s),
*arc_easy*.jsonl (query, choices, gold), *winogrande*.jsonl (context_options, continuation, gold). OUT gets the
documents of each in the shape that its yaml in benchmarks/tasks reads, and the yaml. The model sees the same texts as
in lm-evaluation-harness; those of HellaSwag are cleaned by the harness's own function.
"""

import argparse
import json
import shutil
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from leangrid.errors import LeangridError, TaskError
from leangrid.evaluation.tasks.data_files import find_file, read_json_lines, read_text

YAML = Path(__file__).with_name("tasks")
Rows = Iterator[dict[str, Any]]


def arc_easy(data: Path) -> Rows:
    for row in read_json_lines(find_file("arc_easy", data, "*arc_easy*.jsonl")):
        yield {"query": row["query"], "choices": row["choices"], "gold": row["gold"]}


def hellaswag(data: Path) -> Rows:
    clean: Callable[[str], str] = import_module("lm_eval.tasks.hellaswag.utils").preprocess
    for row in read_json_lines(find_file("hellaswag", data, "hellaswag*.jsonl")):
        context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
        yield {
            "query": clean(context),
            "choices": [clean(ending) for ending in row["endings"]],
            "gold": int(row["label"]),
        }


def piqa(data: Path) -> Rows:
    rows = read_json_lines(find_file("piqa", data, "piqa*.jsonl"))
    file = find_file("piqa", data, "piqa*labels.lst")
    labels = read_text(file).split()
    if len(labels) != len(rows):
        raise TaskError(
            f"{len(labels)} labels for {len(rows)} questions",
            file,
            "Take the labels that belong to the questions' file",
        )
    for row, label in zip(rows, labels, strict=True):
        yield {"goal": row["goal"], "sol1": row["sol1"], "sol2": row["sol2"], "label": int(label)}


def winogrande(data: Path) -> Rows:
    for row in read_json_lines(find_file("winogrande", data, "*winogrande*.jsonl")):
        yield {"context_options": row["context_options"], "continuation": row["continuation"], "gold": row["gold"]}


TASKS: dict[str, Callable[[Path], Rows]] = {
    "arc_easy": arc_easy,
    "hellaswag": hellaswag,
    "piqa": piqa,
    "winogrande": winogrande,
}


def convert(data: Path, out: Path) -> dict[str, int]:
    """Write the documents of ``data`` to ``out`` and return task -> number of documents. LeangridError is raised for a
    file that is not as described above."""
    written = {}
    for name, rows in TASKS.items():
        if not any(data.glob(f"*{name}*.jsonl")):
            continue
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows(data)]
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        shutil.copy(YAML / f"{name}.yaml", out)
        written[name] = len(lines)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    try:
        written = convert(options.data, options.out)
    except LeangridError as error:
        raise SystemExit(f"error: {error}") from error
    for name, documents in written.items():
        print(f"{name}: {documents} documents")
    if not written:
        raise SystemExit(f"error: no file of {', '.join(TASKS)} ({options.data})")


if __name__ == "__main__":
    main()

"""What does each scheme cost in task accuracy? The original and each scheme on the tasks of lm-evaluation-harness.

    python benchmarks/local_tasks.py downloads my-tasks
    python benchmarks/accuracy.py --tasks-dir my-tasks --calibration c4.jsonl --limit 250 \\
        --out benchmarks/results/accuracy.jsonl

Without --tasks-dir the tasks come from the hub. Every model answers the same documents (the first --limit of each task)
in float32 by ``leangrid eval --tasks``, quantized layers packed as they are stored. "original" among --schemes stands
for the model itself. One JSON line for each scheme: accuracy and standard error of each task, "mean_accuracy" in
percent and "mean_stderr".
"""

import argparse
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from common import quantize_process
from common.task_list import Tasks as TaskList
from common.task_list import run_each
from common.workload import Workload, default_source
from leangrid.evaluation import Tasks, evaluate
from leangrid.recipe import Recipe

_TASKS = "arc_easy,hellaswag,piqa,winogrande"
_SCHEMES = "original,NU4,W4A16_G64,GPTQ4_G64,NU3,W3A16_G64,GPTQ3_G64"


def measure_accuracy(model: Path, asked: Tasks, device: str = "cpu") -> dict[str, Any]:
    """The figures of each task, their mean accuracy in percent and its standard error.

    quantize_process.Failed is raised where a task failed or has no accuracy; it says which and why.
    """
    found = evaluate(model, tasks=asked, device=device).tasks
    if failed := [f"{name}: {figures['error']}" for name, figures in found.items() if "error" in figures]:
        raise quantize_process.Failed("; ".join(failed))
    if without := [name for name, figures in found.items() if "acc" not in figures or figures["stderr"] is None]:
        raise quantize_process.Failed(f"no accuracy with a standard error: {', '.join(without)}")
    accuracies, deviations = ([figures[key] for figures in found.values()] for key in ("acc", "stderr"))
    return {"tasks": found, "mean_accuracy": 100 * sum(accuracies) / len(found),
            "mean_stderr": 100 * sum(value**2 for value in deviations) ** 0.5 / len(found)}  # fmt: skip


def measure_scheme(work: Workload, recipe: Recipe, asked: Tasks, folder: Path, threads: int | None) -> dict[str, Any]:
    """Quantize by ``recipe``, measure the accuracy, delete the result."""
    out = folder / "out"
    result = quantize_process.quantize(
        work.source, out, recipe.model_dump(exclude={"calibration"}), work.windows_file, threads
    )
    try:
        found = measure_accuracy(out, asked)
    finally:
        shutil.rmtree(out)  # or the next scheme would find the directory taken
    return found | {name: result[name] for name in ("bits_per_weight", "bytes", "rescues")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--source", type=Path, help="checkpoint directory or .gguf file; the demo model where none is given"
    )
    parser.add_argument("--tasks", default=_TASKS)
    parser.add_argument("--tasks-dir", type=Path)
    parser.add_argument("--limit", type=int, help="documents of each task; all where none is given")
    parser.add_argument("--schemes", default=_SCHEMES)
    parser.add_argument("--calibration", default="self", help="self, embedded, c4, wikitext2, or a .txt/.jsonl file")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, help="results file; a line of the same measurement is replaced")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    asked = Tasks.parse(options.tasks, directory=options.tasks_dir, limit=options.limit)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        work = Workload.open(
            options.source or default_source(), options.calibration, options.samples, options.length, 0, folder
        )
        chosen = [scheme for scheme in options.schemes.split(",") if scheme]
        recipes = {
            scheme: work.recipe(scheme, {}) for scheme in chosen if scheme != "original"
        }  # a wrong scheme is told now

        def tasks() -> TaskList:
            for number, scheme in enumerate(chosen, 1):
                print(f"{number} of {len(chosen)}: {scheme}", file=sys.stderr, flush=True)
                head = {"benchmark": "accuracy", "model": work.name, "scheme": scheme, "variant": "default",
                        "base": {"tasks": options.tasks, "documents": options.limit}}  # fmt: skip
                if scheme == "original":
                    yield head, partial(measure_accuracy, work.source, asked)
                else:
                    learned = {"recipe": recipes[scheme].model_dump(), "windows_sha256": work.windows_sha256}
                    yield head | learned, partial(measure_scheme, work, recipes[scheme], asked, folder, options.threads)

        run_each(tasks(), options.out)


if __name__ == "__main__":
    main()

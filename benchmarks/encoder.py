"""Is LeanQuant-Exact worth its time on an encoder? SQuAD F1 of each method at 4 and 3 bits (the paper's BERT table).

    python benchmarks/squad_finetune.py xquad.en.json .models/minilm_squad
    python benchmarks/encoder.py .models/minilm_squad [--schemes NU4_EXACT,...] [--out FILE]

MODEL is what squad_finetune.py wrote, with MODEL-data beside it: the model answers questions on articles that it was
not trained on (``leangrid eval --tasks squad``), and contexts that it was trained on calibrate. Exact and blocked runs
follow the paper (no correction, no refit, no guarded rows), so that they differ only in the order of elimination;
``default`` is the recipe that leangrid uses by itself. Each quantization runs in a process of its own. One JSON line
for each run: F1, exact match, losses and seconds.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from common import lines, quantize_process
from common.machine import provenance
from common.workload import Workload
from leangrid.evaluation import Tasks, evaluate
from leangrid.recipe import Recipe
from leangrid.schemes import Scheme

_PLAIN = {"correct": "0", "refine": "0", "guard": "false"}
RUNS = "RTN4,GPTQ4,W4A16,W4A16_EXACT,NU4,NU4_EXACT,NU4:default,RTN3,GPTQ3,W3A16,NU3,NU3_EXACT,NU3:default"
SAMPLES, LENGTH = 64, 256  # calibration windows, and tokens of each
_KEPT = ("bits_per_weight", "loss", "loss_minmax", "loss_rounding", "rescues", "seconds")
_METHODS = {"gptq": "GPTQ", "rtn": "rounding"}


def recipe_of(text: str, work: Workload) -> tuple[str, Recipe]:
    """The method's name and the resolved recipe of ``NU4`` (by the paper's procedure) or ``NU4:default``."""
    scheme, _, kind = text.partition(":")
    parsed = Scheme.parse(scheme)
    name = _METHODS.get(parsed.method) or ("exact" if parsed.exact else "blocked")
    return (kind or name), work.recipe(scheme, {} if kind else _PLAIN)


def measure_answers(model: Path, data: Path) -> dict[str, Any]:
    """F1, exact match, their standard errors, and the number of questions."""
    found = evaluate(model, tasks=Tasks(("squad",), data)).tasks["squad"]
    if "error" in found:
        raise SystemExit(found["error"])
    return {key: found[key] for key in ("f1", "stderr", "exact_match", "exact_match_stderr", "n")}


class Encoder:
    """The model, its calibration, and what it reaches before it is quantized."""

    def __init__(self, model: Path, samples: int, length: int, folder: Path, threads: int | None) -> None:
        self.folder, self.threads, data = (
            folder,
            threads or torch.get_num_threads(),
            model.with_name(model.name + "-data"),
        )
        self.work = Workload.open(model, str(data / "train.txt"), samples, length, 0, folder)
        self.asked = data / "heldout"
        self.original = measure_answers(model, self.asked)

    def line(self, method: str, recipe: Recipe) -> dict[str, Any]:
        """The fields of one run's line, without its provenance."""
        out = self.folder / "out"
        result = quantize_process.quantize(
            self.work.source, out, recipe.model_dump(exclude={"calibration"}), self.work.windows_file, self.threads
        )
        found = measure_answers(out, self.asked)
        shutil.rmtree(out)
        return {
            "benchmark": "encoder",
            "model": self.work.name,
            "scheme": recipe.scheme,
            "variant": method,
            "bits": recipe.parsed.bits,
            "windows_sha256": self.work.windows_sha256,
            "threads": self.threads,
            **found,
            "original_f1": self.original["f1"],
            "original_exact_match": self.original["exact_match"],
            **{key: result[key] for key in _KEPT},
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--schemes", default=RUNS)
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--length", type=int, default=LENGTH)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    transformers_logging.disable_progress_bar()
    if options.threads:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        encoder = Encoder(options.model, options.samples, options.length, Path(temporary), options.threads)
        todo = [recipe_of(text, encoder.work) for text in options.schemes.split(",") if text]
        for number, (method, recipe) in enumerate(todo, 1):
            print(f"{number} of {len(todo)}: {recipe.scheme} {method}", file=sys.stderr, flush=True)
            line = encoder.line(method, recipe) | provenance()
            lines.show(line, options.out)


if __name__ == "__main__":
    main()

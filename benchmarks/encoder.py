"""Does LeanQuant-Exact earn its time on an encoder? SQuAD F1 of each method at 4 and 3 bits, the paper's BERT table; one JSON line each.

    python benchmarks/squad_finetune.py xquad.en.json .models/minilm_squad
    python benchmarks/encoder.py .models/minilm_squad [--schemes NU4_EXACT,...] [--out FILE]

MODEL is what squad_finetune.py left, with MODEL-data beside it: the articles it never saw are asked (`leangrid eval --tasks squad`),
contexts it was trained on calibrate. Exact and blocked go by the paper (no correction, no refit, no guarded rows), so that they differ in
the order of elimination alone; `default` is what leangrid does by itself. Each quantization runs in a process of its own.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import lines
import once
import torch
from machine import provenance
from transformers.utils import logging as transformers_logging
from workload import Workload

from leangrid.evaluate import Tasks, evaluate
from leangrid.recipe import Recipe, Scheme

_PLAIN = {"correct": "0", "refine": "0", "guard": "false"}
RUNS = "RTN4,GPTQ4,W4A16,W4A16_EXACT,NU4,NU4_EXACT,NU4:default,RTN3,GPTQ3,W3A16,NU3,NU3_EXACT,NU3:default"
_METHODS = {"gptq": "GPTQ", "rtn": "rounding"}


def recipe_of(text: str, work: Workload) -> tuple[str, Recipe]:
    """``NU4`` or ``NU4:default`` as the method's name and its resolved recipe."""
    scheme, _, kind = text.partition(":")
    parsed = Scheme.parse(scheme)
    name = _METHODS.get(parsed.method) or ("exact" if parsed.exact else "blocked")
    return (kind or name), work.recipe(scheme, {} if kind else _PLAIN)


def measured(model: Path, data: Path) -> dict[str, Any]:
    """F1, exact match and how many questions."""
    found = evaluate(model, tasks=Tasks(("squad",), data))["tasks"]["squad"]
    if "error" in found:
        raise SystemExit(found["error"])
    return {key: found[key] for key in ("f1", "stderr", "exact_match", "exact_match_stderr", "n")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--schemes", default=RUNS)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    transformers_logging.disable_progress_bar()
    if options.threads:
        torch.set_num_threads(options.threads)
    data = options.model.with_name(options.model.name + "-data")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        work = Workload.open(options.model, str(data / "train.txt"), options.samples, options.length, 0, folder)
        todo = [recipe_of(text, work) for text in options.schemes.split(",") if text]
        original = measured(options.model, data / "heldout")
        for number, (method, recipe) in enumerate(todo, 1):
            print(f"{number} of {len(todo)}: {recipe.scheme} {method}", file=sys.stderr, flush=True)
            out = folder / "out"
            result = once.quantize(work.source, out, recipe.model_dump(exclude={"calibration"}), work.windows_file, options.threads)
            line = {"benchmark": "encoder", "model": work.name, "scheme": recipe.scheme, "variant": method, "bits": recipe.parsed.bits,
                    "windows_sha256": work.windows_sha256, "threads": options.threads or torch.get_num_threads(),
                    **measured(out, data / "heldout"), "original_f1": original["f1"], "original_exact_match": original["exact_match"],
                    **{key: result[key] for key in ("bits_per_weight", "loss", "loss_minmax", "loss_rounding", "rescues", "seconds")},
                    **provenance()}  # fmt: skip
            shutil.rmtree(out)
            print(lines.text(line), flush=True)
            if options.out:
                lines.add(options.out, line)


if __name__ == "__main__":
    main()

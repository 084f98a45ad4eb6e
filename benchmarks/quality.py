"""How near does each scheme stay to the original? One JSON line for each scheme and variant, on stdout and in --out.

    # the demo model, its own samples, Python's documentation
    python benchmarks/quality.py
    python benchmarks/quality.py --source DIR --calibration c4.jsonl --samples 16 --length 1024 --text wiki.test.raw \\
        --windows 12 --schemes W4A16_G64,NU4 --variants default,nocorrect,norefine,paper \\
        --out benchmarks/results/quality.jsonl

A causal model is measured by perplexity, KL per token and top-1 agreement on the first windows x length tokens of the
text (Frantar et al.'s procedure); an encoder by the STS Benchmark (--text sts-test.csv). The original is run once for
all. Each quantization runs in a process of its own, with the same calibration windows. A baseline (GPTQ..., RTN...)
leaves out the variants that do not change it (common/variants.py).
"""

import argparse
import gc
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from common import lines, quantize_process, variants
from common.machine import provenance
from common.original import Original, open_original
from common.task_list import Tasks, run_each
from common.workload import Workload, default_source
from leangrid.recipe import Recipe
from leangrid.schemes import Scheme

_SCHEMES = "W4A16_G64,GPTQ4_G64,W3A16_G64,GPTQ3_G64,NU4,NU3"


def list_runs(work: Workload, schemes: list[str], chosen: dict[str, dict[str, str]]) -> Iterator[tuple[str, Recipe]]:
    """Every (variant, resolved recipe), without those that give the same result as an earlier one of their scheme."""
    for scheme in schemes:
        seen: set[str] = set()
        for name, fields in chosen.items():
            recipe = work.recipe(scheme, fields)
            if variants.does(recipe) in seen:
                continue
            seen.add(variants.does(recipe))
            baseline = Scheme.parse(scheme).method != "leanquant" and not fields.keys() & {"correct", "refine"}
            yield ("default" if baseline else name), recipe


def measure_result(
    work: Workload, original: Original, recipe: Recipe, folder: Path, threads: int | None
) -> dict[str, Any]:
    """Quantize, measure, delete the result."""
    out = folder / "out"
    result = quantize_process.quantize(
        work.source, out, recipe.model_dump(exclude={"calibration"}), work.windows_file, threads
    )
    begin = time.perf_counter()
    figures = original.measure(out)
    gc.collect()
    shutil.rmtree(out)
    kept = (
        "bits_per_weight",
        "bytes",
        "layers",
        "loss",
        "loss_minmax",
        "loss_rounding",
        "correction",
        "rescues",
        "notes",
        "seconds",
        "peak_ram_bytes",
        "kernels",
    )
    return figures | {name: result[name] for name in kept} | {"evaluate_seconds": round(time.perf_counter() - begin, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--source", type=Path, help="checkpoint directory or .gguf file; the demo model where none is given"
    )
    parser.add_argument("--name", help="of the model in the tables; the source's own where none is given")
    parser.add_argument(
        "--calibration", default="self", help="self, embedded, c4, wikitext2, a .txt/.jsonl file, or an STS .csv file"
    )
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument(
        "--length", type=int, default=1024, help="tokens of a calibration window, and of an evaluation window"
    )
    parser.add_argument("--evaluation-length", type=int, help="tokens of an evaluation window, where it is another")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", default="embedded", help="what is evaluated on; an STS .csv file for an encoder")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--schemes", default=_SCHEMES, help="with commas between them")
    parser.add_argument(
        "--variants",
        nargs="+",
        default=["default", "paper"],
        help=f"{', '.join(variants.KNOWN)}, or NAME:FIELD=VALUE,...",
    )
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, help="results file; a line of the same measurement is replaced")
    parser.add_argument(
        "--skip-done", action="store_true", help="leave out what --out already has (made by any version of the code)"
    )
    options = parser.parse_args()
    chosen = variants.parse(options.variants)
    if options.threads:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = options.source or default_source()
        work = Workload.open(
            source, options.calibration, options.samples, options.length, options.seed, folder, options.name
        )
        todo = list(
            list_runs(work, [scheme for scheme in options.schemes.split(",") if scheme], chosen)
        )  # a wrong scheme is told now
        original = open_original(
            work.source, options.text, options.windows, options.evaluation_length or options.length
        )
        origin = provenance()
        done = (
            {lines.identity(line) for line in lines.read(options.out)} if options.out and options.skip_done else set()
        )

        def tasks() -> Tasks:
            for number, (variant, recipe) in enumerate(todo, 1):
                head = {"benchmark": "quality", "model": work.name, "scheme": recipe.scheme, "variant": variant,
                        "recipe": recipe.model_dump(), "windows_sha256": work.windows_sha256,
                        "threads": options.threads or torch.get_num_threads(), **original.about}  # fmt: skip
                print(f"{number} of {len(todo)}: {recipe.scheme} {variant}", file=sys.stderr, flush=True)
                if lines.identity(head | origin) not in done:
                    yield head, partial(measure_result, work, original, recipe, folder, options.threads)

        run_each(tasks(), options.out)


if __name__ == "__main__":
    main()

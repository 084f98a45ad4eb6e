"""What does a budget of bits give beside one width for all layers, at the same size? One JSON line for each result.

    python benchmarks/bits_front.py --source .models/stories260k --name stories260K \\
        --calibration .models/stories260k/calibration.txt --text .models/stories260k/evaluation.txt \\
        --out benchmarks/results/bits_front.jsonl

For each number of bits the model is quantized with that width in all layers (``uniform``), and then by ``--bits`` with
exactly as many bits a weight (``budget``). Mean KL from the original, and what the budget's own measurements expected.
All in one process: its seconds show what measuring adds, not more.
"""

import argparse
import shutil
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

import leangrid
from common.original import Original, open_original
from common.task_list import Tasks, run_each
from common.workload import Workload
from leangrid.recipe import Recipe
from leangrid.storage import safetensors

_KEPT = ("bits_per_weight", "bytes", "layers", "loss", "budget", "seconds")


def measure_result(work: Workload, original: Original, recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Quantize, measure, delete the result."""
    windows = safetensors.load(work.windows_file)["windows"]
    result = leangrid.quantize(work.source, folder / "out", recipe, windows=windows)
    figures = original.measure(folder / "out")
    shutil.rmtree(folder / "out")
    return figures | {name: result[name] for name in _KEPT}


def list_recipes(source: Path, scheme: str, bits: list[int], fields: dict[str, Any]) -> Iterator[tuple[str, Recipe]]:
    """("uniform", recipe) and ("budget", recipe) for each number of bits."""
    for one in bits:
        uniform = Recipe(scheme=scheme.format(bits=one), **fields)
        yield "uniform", uniform
        exactly = leangrid.plan(source, uniform).bits_per_weight
        yield "budget", uniform.model_copy(update={"bits": round(exactly + 5e-5, 4)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="checkpoint directory or .gguf file")
    parser.add_argument("--name", help="of the model in the tables")
    parser.add_argument("--calibration", required=True, help="a text file, c4, self, embedded")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--text", required=True, help="what is evaluated on")
    parser.add_argument("--windows", type=int, default=84, help="of the text")
    parser.add_argument("--scheme", default="W{bits}A16", help="with {bits} for the number of bits")
    parser.add_argument("--bits", default="3,4,5", help="with commas between them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="results file; a line of the same measurement is replaced")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        work = Workload.open(
            options.source, options.calibration, options.samples, options.length, options.seed, folder, options.name
        )
        original = open_original(work.source, options.text, options.windows, options.length)
        fields = {"samples": options.samples, "length": options.length, "seed": options.seed}
        bits = [int(one) for one in options.bits.split(",")]

        def tasks() -> Tasks:
            for variant, recipe in list_recipes(work.source, options.scheme, bits, fields):
                head = {"benchmark": "bits_front", "model": work.name, "scheme": recipe.scheme, "variant": variant,
                        "recipe": recipe.model_dump(exclude={"calibration"}), "windows_sha256": work.windows_sha256,
                        "threads": torch.get_num_threads(), **original.about}  # fmt: skip
                yield head, partial(measure_result, work, original, recipe, folder)

        run_each(tasks(), options.out)


if __name__ == "__main__":
    main()

"""How long does quantizing take, where does the time go, and how much memory does it need? One line a scheme.

    # the demo model
    python benchmarks/quantize_time.py
    python benchmarks/quantize_time.py --source DIR --schemes W4A16_G64 NU4 NU4@paper GPTQ4_G64 --rounds 3 \\
        --out benchmarks/results/quantize_time.jsonl

Every run is a process of its own on the same windows. The schemes take turns (A B C A B C ...), so that a machine that
slows down slows all of them. A line holds the medians over the rounds, the total of every round, and the ratio to the
first scheme (the median of the ratios within each round). SCHEME@VARIANT takes a variant of common/variants.py.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch

from common import lines, quantize_process, variants
from common.machine import provenance
from common.workload import Workload, default_source
from leangrid.recipe import Recipe


def parse_schemes(work: Workload, texts: list[str]) -> dict[tuple[str, str], Recipe]:
    """(scheme, variant) -> resolved recipe, in the order given."""
    found = {}
    for text in texts:
        scheme, _, variant = text.partition("@")
        variant = variant or "default"
        if variant not in variants.KNOWN:
            raise SystemExit(f"'{variant}' is no variant: {', '.join(variants.KNOWN)}")
        found[scheme, variant] = work.recipe(scheme, variants.KNOWN[variant])
    return found


def summarize(results: list[dict[str, Any]], first: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over several runs of one scheme, and ratios to the runs of the first scheme in the same rounds."""
    totals = [result["seconds"]["total"] for result in results]
    ratios = [total / other["seconds"]["total"] for total, other in zip(totals, first, strict=True)]
    stages = {
        stage: round(median(result["seconds"].get(stage, 0.0) for result in results), 3)
        for stage in results[0]["seconds"]
    }
    return {
        "seconds": stages,
        "totals": totals,
        "ratio_to_first": round(median(ratios), 3),
        "peak_ram_bytes": max(result["peak_ram_bytes"] for result in results),
        "layers": results[0]["layers"],
        "kernels": results[0]["kernels"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--source", type=Path, help="checkpoint directory or .gguf file; the demo model where none is given"
    )
    parser.add_argument("--name", help="of the model in the tables; the source's own where none is given")
    parser.add_argument("--calibration", default="embedded", help="its content does not change the time")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--schemes", nargs="+", default=["W4A16_G64", "NU4", "GPTQ4_G64"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="results file; a line of the same measurement is replaced")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds is at least 1")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = options.source or default_source()
        work = Workload.open(
            source, options.calibration, options.samples, options.length, options.seed, folder, options.name
        )
        chosen = parse_schemes(work, options.schemes)
        results: dict[tuple[str, str], list[dict[str, Any]]] = {key: [] for key in chosen}
        for turn in range(options.rounds):
            for number, (key, recipe) in enumerate(chosen.items()):
                fields = recipe.model_dump(exclude={"calibration"})
                result = quantize_process.quantize(
                    work.source, folder / f"{turn}-{number}", fields, work.windows_file, options.threads, options.device
                )
                results[key].append(result)
                print(
                    f"round {turn + 1}: {'@'.join(key)} {result['seconds']['total']:.1f} s", file=sys.stderr, flush=True
                )
        origin = provenance()
    first = next(iter(results.values()))
    for (scheme, variant), every in results.items():
        line = {
            "benchmark": "quantize_time",
            "model": work.name,
            "scheme": scheme,
            "variant": variant,
            "rounds": options.rounds,
            "recipe": chosen[scheme, variant].model_dump(),
            "windows_sha256": work.windows_sha256,
            "threads": options.threads or torch.get_num_threads(),
            **summarize(every, first),
        } | origin
        lines.show(line, options.out)


if __name__ == "__main__":
    main()

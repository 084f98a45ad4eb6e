"""How near does the plan's time come to the measured one? Stage by stage, for blocks of known shapes on this machine.

    # SmolLM2's shape and a wider one, some minutes
    python benchmarks/cost_model.py --out benchmarks/results/cost_model.jsonl

Two random blocks in a model's shape go through ``leangrid.quantize`` with one thread; ``leangrid.plan`` of the same
says what each stage should take (docs/performance.md has the formulas). One JSON line for each model and scheme:
"planned_seconds", "seconds" and their ratios "planned_over_measured", which leave out stages under 0.05 s.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

import leangrid
from common import lines
from common.machine import provenance
from common.random_model import MODELS, checkpoint
from leangrid.planning.placement import Placement

_LEAST = 0.05  # seconds


def measure(model: str, scheme: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The fields of the line of one model in one scheme."""
    source = checkpoint(folder / "source", model, options.blocks, "cpu")
    recipe = leangrid.Recipe(scheme=scheme, samples=options.samples, length=options.length)
    windows = torch.randint(512, (options.samples, options.length), generator=torch.Generator().manual_seed(0))
    planned = leangrid.plan(source, recipe, threads=1, out=folder / "out")
    placement = Placement.from_json(planned.placement)
    done = leangrid.quantize(source, folder / "out", recipe, windows=windows, threads=1, placement=placement)
    ratios = {
        name: round(planned.seconds[name] / took, 2)
        for name, took in done.seconds.items()
        if name in planned.seconds and name not in ("load", "save", "pack", "check") and took >= _LEAST
    }
    return {
        "blocks": options.blocks,
        "tokens": windows.numel(),
        "planned_seconds": planned.seconds,
        "seconds": done.seconds,
        "planned_over_measured": ratios,
        "rates": planned.rates,
        "planned_peak_bytes": planned.peak_ram_bytes,
        "peak_ram_bytes": done.peak_ram_bytes,
        "placement": planned.placement,
        "kernels": done.kernels,
        "threads": 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["smollm2-135m", "narrow"])
    parser.add_argument("--schemes", nargs="+", default=["W4A16_G64", "W4A16", "NU4"])
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--out", type=Path, help="results file; a line of the same measurement is replaced")
    options = parser.parse_args()
    for model in options.models:
        for scheme in options.schemes:
            with tempfile.TemporaryDirectory() as temporary:
                found = measure(model, scheme, options, Path(temporary))
            line = {"benchmark": "cost_model", "model": model, "scheme": scheme} | found | provenance()
            lines.show(line, options.out)


if __name__ == "__main__":
    main()

"""How long does one block of a large model take on a GPU, where does the time go, and how much memory does it need?

    python benchmarks/gpu_block.py --model llama-3-8b --scheme W4A16_G128 --out benchmarks/results/gpu_block.jsonl
    # as on a card of 48 GiB; writes 40 GB to disk
    python benchmarks/gpu_block.py --model llama-3.1-405b --blocks 1 --card 48
    # only what the plan says, without a GPU
    python benchmarks/gpu_block.py --model llama-3.1-405b --planned 2x48GB
    # a small run on a CPU, to test the script
    python benchmarks/gpu_block.py --model tiny --device cpu

Two random blocks in the model's shapes are written as a checkpoint and go through ``leangrid.quantize`` itself, on 128
windows of 2,048 tokens. Embeddings and norms have outlier channels, as real activations do. Blocks are alike, so the
time of the whole model is that of the last block (weights read ahead, both streams different, states saved) times the
number of blocks: "projected_hours". One JSON line: seconds by stage and block, peak memory, and the plan's memory.
"""

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault(
    "PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"
)  # before torch: matrices of 10 GiB leave no holes then

import torch

import leangrid
from common import lines
from common.machine import provenance
from common.random_model import MODELS, checkpoint
from leangrid.planning.demand import Demand
from leangrid.planning.footprint import Footprint, choose_placement, sum_footprint
from leangrid.planning.placement import Placement
from leangrid.planning.resolve import open_checkpoint
from leangrid.progress import Event
from leangrid.recipe import Recipe


def plan_run(
    source: Path, recipe: Recipe, windows: torch.Tensor, device: str, card: float | None
) -> tuple[Placement, Footprint, Recipe]:
    """The placement that the plan chooses for this device, or for a card of ``card`` GiB, the plan's memory, and the
    resolved recipe."""
    _, skeleton, settled = open_checkpoint(source, recipe, device)
    if card is None:
        return *choose_placement(skeleton, settled, *windows.shape, device), settled
    placement, _ = choose_placement(skeleton, settled, *windows.shape, device, budget=int(0.94 * card * 2**30))
    return placement, sum_footprint(Demand.of(skeleton, settled, *windows.shape, device), placement), settled


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The fields of the line of one run."""
    source = checkpoint(folder / "source", options.model, options.blocks, options.device)
    vocabulary = json.loads((source / "config.json").read_text())["vocab_size"]
    windows = torch.randint(vocabulary, (options.samples, options.length), generator=torch.Generator().manual_seed(0))
    recipe = Recipe(scheme=options.scheme, damping=options.damping, samples=options.samples, length=options.length)
    placement, sums, settled = plan_run(source, recipe, windows, options.device, options.card)
    times, notices = [time.perf_counter()], []

    def told(event: Event) -> None:
        if event.stage == "block":
            times.append(time.perf_counter())
        elif event.stage == "notice" and "memory" in event.message:
            notices.append(event.message)
        print(f"{event.stage} {event.block} {event.layer} {event.message}", file=sys.stderr, flush=True)

    result = leangrid.quantize(
        source, folder / "out", recipe, windows=windows, device=options.device, placement=placement, progress=told
    )
    blocks = [round(after - before, 2) for before, after in itertools.pairwise(times)]
    layers = MODELS[options.model]["layers"]
    return {
        "layers": layers,
        "tokens": windows.numel(),
        "seconds": result.seconds,
        "block_seconds": blocks,
        "projected_hours": round(blocks[-1] * layers / 3600, 3),
        "peak_gpu_bytes": result.peak_gpu_bytes,
        "planned_bytes": sums.peak,
        "planned_phase": sums.peak_phase,
        "planned_parts": sums.phases[sums.peak_phase],
        "planned_over_measured": round(sums.peak / result.peak_gpu_bytes, 3) if result.peak_gpu_bytes else None,
        "peak_ram_bytes": result.peak_ram_bytes,
        "placement": placement.to_json(),
        "gave_way": notices,
        "loss_over_minmax": round(result.loss / result.loss_minmax, 4),
        "rescues": result.rescues,
        "kernels": result.kernels,
        "recipe": settled.model_dump(),
        "windows_sha256": result.windows_sha256,
    }


def describe_plan(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of the line for cards that are not here: what the plan says of them."""
    recipe = Recipe(scheme=options.scheme, damping=options.damping, samples=options.samples, length=options.length)
    found = leangrid.plan(None, recipe, device=options.planned, shape=options.model)
    phase = found.memory["peak_phase"]
    return {
        "tokens": options.samples * options.length,
        "devices": found.devices,
        "projected_hours": round(found.seconds["total"] / 3600, 2),
        "planned_bytes": found.peak_gpu_bytes,
        "planned_phase": phase,
        "planned_parts": found.memory["phases"][phase],
        "peak_ram_bytes": found.peak_ram_bytes,
        "disk_bytes": found.disk_bytes,
        "ram_with_states_on_disk": found.memory["ram_with_states_on_disk"],
        "placement": found.placement,
        "seconds": found.seconds,
        "rates": found.rates,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="llama-3-8b", help="whose shapes")
    parser.add_argument("--scheme", default="W4A16_G128")
    parser.add_argument("--damping", type=float, default=0.01)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--blocks", type=int, default=2, help="blocks that are quantized; the last one is projected")
    parser.add_argument("--samples", type=int, help="windows [128; 8 for tiny]")
    parser.add_argument("--length", type=int, help="tokens a window [2048; 64 for tiny]")
    parser.add_argument("--card", type=float, metavar="GIB", help="plan for, and stay within, a card of this size")
    parser.add_argument(
        "--planned", metavar="DEVICES", help="only what the plan says of these, such as 2x48GB@16TF; needs no GPU"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        help="where the checkpoint and the result are written; a temporary one where none is given",
    )
    parser.add_argument("--out", type=Path, help="results file; a line of the same measurement is replaced")
    options = parser.parse_args()
    options.samples = options.samples or (8 if options.model == "tiny" else 128)
    options.length = options.length or (64 if options.model == "tiny" else 2048)
    if options.planned:
        line = {
            "benchmark": "gpu_block",
            "model": options.model,
            "scheme": options.scheme,
            "variant": f"planned, {options.planned}",
        }
        lines.show(line | describe_plan(options) | provenance(), options.out)
        return
    if options.device.startswith("cuda"):
        if not torch.cuda.is_available():
            raise SystemExit(
                "no CUDA device here: run this on a machine with one, or try the script with --model tiny --device cpu"
            )
        if options.card:
            torch.cuda.set_per_process_memory_fraction(min(1.0, options.card * 2**30 / torch.cuda.mem_get_info()[1]))
    elif options.model != "tiny":
        raise SystemExit(f"a block of {options.model} on the CPU would take hours: use --model tiny, or a CUDA device")
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        found = measure(options, Path(temporary))
    line = (
        {"benchmark": "gpu_block", "model": options.model, "scheme": options.scheme, "variant": _variant(options)}
        | found
        | provenance()
    )
    lines.show(line, options.out)


def _variant(options: argparse.Namespace) -> str:
    return f"{options.blocks} blocks" + (f", {options.card:g} GiB" if options.card else "")


if __name__ == "__main__":
    main()

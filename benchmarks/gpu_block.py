"""How long does one block of a large model take on a GPU, where does the time go, and what memory does it need?

    python benchmarks/gpu_block.py --model llama-3-8b --scheme W4A16_G128 --out benchmarks/results/gpu_block.jsonl
    python benchmarks/gpu_block.py --model llama-3.1-405b --blocks 1 --card 48            # as on a card of 48 GiB; 40 GB of disk
    python benchmarks/gpu_block.py --model llama-3.1-405b --planned 2x48GB                # the plan's sums for it, without a GPU
    python benchmarks/gpu_block.py --model tiny --device cpu                              # runs anywhere: is the script sound?

Random weights in the model's shapes, two blocks of them as a checkpoint on disk, go through ``leangrid.quantize`` itself on 128 windows
of 2,048 tokens. The model's embeddings and norms carry outlier channels, as real activations do. Blocks are alike, so the whole model is
the last block's time (weights read ahead, both streams different, states saved) times its number of blocks. One JSON line.
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

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # before torch: matrices of 10 GiB leave no holes then

import lines
import torch
import transformers
from machine import provenance

import leangrid
from leangrid.footprint import Demand, Footprint, choose, footprint
from leangrid.placement import Placement
from leangrid.prepare import open_model
from leangrid.progress import Event
from leangrid.recipe import Recipe
from leangrid.storage import files, safetensors

_LLAMA = {"num_key_value_heads": 8, "rope_theta": 500000.0, "max_position_embeddings": 8192, "tie_word_embeddings": True}
MODELS: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 8, "layers": 4, "vocab_size": 512},
    "narrow": {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 32, "layers": 249, "vocab_size": 512},
    "smollm2-135m": {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3, "layers": 30},
    "llama-3-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "layers": 32},
    "llama-3-70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "layers": 80},
    "llama-3.1-405b": {"hidden_size": 16384, "intermediate_size": 53248, "num_attention_heads": 128, "layers": 126},
}
VOCABULARY = 32000  # rows of embeddings, not the models' 128,256: more than any hidden size, and less to write
_OUTLIERS, _OUTLIER = 0.005, 20.0  # share of channels, and how much larger they are


def checkpoint(directory: Path, model: str, blocks: int, device: str, seed: int = 0) -> Path:
    """Write ``blocks`` random blocks of ``model`` with a small embedding in bfloat16, one shard each; never more than one in memory."""
    shapes = {"vocab_size": VOCABULARY, **_LLAMA, **MODELS[model], "num_hidden_layers": blocks}
    shapes.pop("layers")
    config = transformers.LlamaConfig(dtype="bfloat16", **shapes)
    config.architectures = ["LlamaForCausalLM"]
    vocabulary, hidden, inner = config.vocab_size, config.hidden_size, config.intermediate_size
    kv = hidden // config.num_attention_heads * config.num_key_value_heads
    generator = torch.Generator(device).manual_seed(seed)

    def matrix(rows: int, cols: int) -> torch.Tensor:
        return torch.randn(rows, cols, generator=generator, device=device, dtype=torch.bfloat16).mul_(cols**-0.5).cpu()

    def channels() -> torch.Tensor:
        large = torch.rand(hidden, generator=generator, device=device) < _OUTLIERS
        return torch.where(large, _OUTLIER, 1.0).to(torch.bfloat16).cpu()

    files.make_dir(directory)
    index: dict[str, str] = {}
    for number in range(blocks + 1):
        prefix = f"model.layers.{number}."
        if number == blocks:
            shard = {"model.embed_tokens.weight": matrix(vocabulary, hidden) * channels(), "model.norm.weight": channels()}
        else:
            linears = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
                       "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
                       "mlp.down_proj": (hidden, inner)}  # fmt: skip
            shard = {f"{prefix}{name}.weight": matrix(*shape) for name, shape in linears.items()}
            shard |= {f"{prefix}{norm}.weight": channels() for norm in ("input_layernorm", "post_attention_layernorm")}
        name = f"model-{number + 1:05d}-of-{blocks + 1:05d}.safetensors"
        safetensors.save(directory / name, shard, {"format": "pt"})
        index |= dict.fromkeys(shard, name)
    config.save_pretrained(directory)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}), encoding="utf-8")
    return directory


def planned(source: Path, recipe: Recipe, windows: torch.Tensor, device: str, card: float | None) -> tuple[Placement, Footprint, Recipe]:
    """What the plan chooses for this device, or for a card of ``card`` GiB, and its sums."""
    _, skeleton, settled = open_model(source, recipe, device)
    if card is None:
        return *choose(skeleton, settled, *windows.shape, device), settled
    placement, _ = choose(skeleton, settled, *windows.shape, device, budget=int(0.94 * card * 2**30))
    return placement, footprint(Demand.of(skeleton, settled, *windows.shape, device), placement), settled


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One run, as the fields of its line."""
    source = checkpoint(folder / "source", options.model, options.blocks, options.device)
    vocabulary = json.loads((source / "config.json").read_text())["vocab_size"]
    windows = torch.randint(vocabulary, (options.samples, options.length), generator=torch.Generator().manual_seed(0))
    recipe = Recipe.build(scheme=options.scheme, damping=options.damping, samples=options.samples, length=options.length)
    placement, sums, settled = planned(source, recipe, windows, options.device, options.card)
    times, notices = [time.perf_counter()], []

    def told(event: Event) -> None:
        if event.stage == "block":
            times.append(time.perf_counter())
        elif event.stage == "notice" and "memory" in event.message:
            notices.append(event.message)
        print(f"{event.stage} {event.block} {event.layer} {event.message}", file=sys.stderr, flush=True)

    result = leangrid.quantize(source, folder / "out", recipe, windows=windows, device=options.device, placement=placement, progress=told)
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


def sums(options: argparse.Namespace) -> dict[str, Any]:
    """What the plan says of cards that are not here, as the fields of a line."""
    recipe = Recipe.build(scheme=options.scheme, damping=options.damping, samples=options.samples, length=options.length)
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
    parser.add_argument("--planned", metavar="DEVICES", help="only what the plan says of these, such as 2x48GB@16TF; needs no GPU")
    parser.add_argument("--folder", type=Path, help="where the checkpoint and the result are written; a temporary one where none is given")
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
        _show(line | sums(options) | provenance(), options.out)
        return
    if options.device.startswith("cuda"):
        if not torch.cuda.is_available():
            raise SystemExit("no CUDA device here: run this on a machine with one, or try the script with --model tiny --device cpu")
        if options.card:
            torch.cuda.set_per_process_memory_fraction(min(1.0, options.card * 2**30 / torch.cuda.mem_get_info()[1]))
    elif options.model != "tiny":
        raise SystemExit(f"a block of {options.model} on the CPU would take hours: use --model tiny, or a CUDA device")
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        found = measure(options, Path(temporary))
    line = {"benchmark": "gpu_block", "model": options.model, "scheme": options.scheme, "variant": _variant(options)} | found | provenance()
    _show(line, options.out)


def _show(line: dict[str, Any], out: Path | None) -> None:
    print(lines.text(line), flush=True)
    if out:
        lines.add(out, line)


def _variant(options: argparse.Namespace) -> str:
    return f"{options.blocks} blocks" + (f", {options.card:g} GiB" if options.card else "")


if __name__ == "__main__":
    main()

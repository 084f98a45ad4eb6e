"""How near do our grids in llama.cpp's block types come to the original, beside llama.cpp's own quantizer?

    python benchmarks/gguf_native.py layers --source DIR --calibration c4.jsonl --types Q4_0 Q4_K \\
        --out benchmarks/results/gguf_native.jsonl
    python benchmarks/gguf_native.py models --source DIR --calibration c4.jsonl --text wiki.test.raw --windows 12 \\
        --types Q4_0 Q4_K

``layers``: tr(E H E^T)/2 of every linear, where H is that of the original model's inputs, so that no layer sees the
error of another; one JSON line for each type and width, summed over its layers. ``leangrid`` is the whole procedure
(grid, sweep, refit), ``min-max GPTQ`` and ``min-max`` are the baselines, ``llama.cpp`` is ``ggml_quantize_chunk`` of
the released library with the mean squared inputs of the same tokens as its importance matrix, ``llama.cpp plain`` the
same without one.

``models``: the whole model, as ``leangrid quantize`` makes it, and with each of the same linears replaced by
llama.cpp's weights; embeddings, head and norms stay as they are. Both have the same type in each layer, the same
calibration windows and one evaluator (common/original.py). llama.cpp runs in a Python of its own that has xllamacpp and
gguf (common/llama_worker.py).
"""

import argparse
import gc
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import leangrid
from common import lines, quantize_process
from common.hessians import collect_hessians
from common.llama_python import WORKER, llama_python
from common.machine import provenance
from common.original import open_original
from common.workload import Workload, default_source
from leangrid.block_types import BLOCK_TYPES
from leangrid.models.skeleton import Skeleton
from leangrid.recipe import Recipe
from leangrid.solve.factor import factorize
from leangrid.solve.hessian import Hessian
from leangrid.solve.layer import layer_loss, solve_linear
from leangrid.storage.source import open_source


class Llama:
    """llama.cpp's quantizer, in a process of its own, one matrix after the other."""

    def __init__(self, python: Path, folder: Path) -> None:
        self.process = subprocess.Popen(
            [python, WORKER, "blocks"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.folder = folder

    def quantized(self, weight: Tensor, kind: str, importance: Tensor | None) -> Tensor:
        """``weight`` [rows, cols] as float32 after llama.cpp's rounding to ``kind``."""
        files = {"weight": weight, "importance": importance}
        asked: dict[str, Any] = {"type": kind, "out": str(self.folder / "out.npy"), "importance": None}
        for name, tensor in files.items():
            if tensor is not None:
                asked[name] = str(self.folder / f"{name}.npy")
                np.save(asked[name], tensor.float().contiguous().numpy())
        if self.process.stdin is None or self.process.stdout is None:
            raise SystemExit("llama.cpp's worker has no pipes")
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        if not self.process.stdout.readline():
            raise SystemExit(f"llama.cpp stopped at {kind}: run {WORKER.name} blocks by hand")
        return torch.from_numpy(np.load(asked["out"]))

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def importance(hessian: Hessian) -> Tensor:
    """Mean squared inputs, float32 [cols], as llama.cpp's imatrix tool collects them: the diagonal of H/2, where H =
    2/N X^T X."""
    return hessian.matrix.diagonal() / 2


@torch.no_grad()
def layer_lines(
    work: Workload, types: list[str], llama: Llama, names: list[str], only: str
) -> Iterator[dict[str, Any]]:
    """The fields of one line for each type and width: the losses, summed over the layers."""
    model, _ = leangrid.load(work.source, dtype=torch.float32)
    taken = [name for name in names if only in name]
    found = collect_hessians(model, taken, work.windows)
    factors: dict[str, Any] = {}
    for kind in types:
        recipe = Recipe(scheme=kind, correct=0).resolved()
        sums: dict[int, dict[str, float]] = {}
        for name in taken:
            hessian, weight = found[name], model.get_submodule(name).weight.detach().float()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
            taken_kind = BLOCK_TYPES[kind].fitting(weight.shape[1])
            if taken_kind.name != kind:
                continue
            factors.setdefault(name, factorize(hessian.matrix, recipe.damping, recipe.act_order))
            result = solve_linear(weight, factors[name], hessian.matrix, recipe)
            theirs = {name: layer_loss(llama.quantized(weight, kind, share), weight, hessian.matrix)
                      for name, share in (("llama.cpp", importance(hessian)), ("llama.cpp plain", None))}  # fmt: skip
            values = {
                "leangrid": result.loss,
                "min-max GPTQ": result.loss_minmax,
                "min-max": result.loss_rounding,
                **theirs,
            }
            row = sums.setdefault(weight.shape[1], {"layers": 0.0})
            row["layers"] += 1
            for key, value in values.items():
                row[key] = row.get(key, 0.0) + value
        for cols, row in sums.items():
            yield {
                "scheme": kind,
                "cols": cols,
                "layers": int(row.pop("layers")),
                "losses": {k: float(f"{v:.5g}") for k, v in row.items()},
                "of_llama_cpp": round(row["leangrid"] / row["llama.cpp"], 4),
            }


@torch.no_grad()
def llama_checkpoint(work: Workload, kind: str, llama: Llama, found: dict[str, Hessian], out: Path) -> float:
    """Write the source with every quantized linear as llama.cpp rounds it, in float32, and return its bits a weight."""
    model, tokenizer = leangrid.load(work.source, dtype=torch.float32)
    stored = weights = 0
    for name, hessian in found.items():
        weight = model.get_submodule(name).weight
        rows, cols = weight.shape  # pyright: ignore[reportGeneralTypeIssues]
        taken = BLOCK_TYPES[kind].fitting(cols)
        weight.copy_(llama.quantized(weight.detach(), taken.name, importance(hessian)))  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
        stored, weights = stored + 8 * rows * taken.row_bytes(cols), weights + rows * cols
    model.save_pretrained(out)
    if tokenizer is not None:
        tokenizer.save_pretrained(out)
    return stored / weights


def model_lines(
    work: Workload, args: argparse.Namespace, llama: Llama, names: list[str], folder: Path
) -> Iterator[dict[str, Any]]:
    """The fields of two lines for each type: our result and llama.cpp's."""
    model, _ = leangrid.load(work.source, dtype=torch.float32)
    found = collect_hessians(model, names, work.windows)
    del model
    original = open_original(work.source, args.text, args.windows, args.length)
    for kind in args.types:
        recipe, out = work.recipe(kind, {}), folder / "model"
        result = quantize_process.quantize(
            work.source, out, recipe.model_dump(exclude={"calibration"}), work.windows_file, args.threads
        )
        kept = {
            name: result[name]
            for name in ("bits_per_weight", "loss", "loss_minmax", "loss_rounding", "rescues", "seconds")
        }
        yield {
            "scheme": kind,
            "variant": "leangrid",
            "recipe": recipe.model_dump(),
            **original.about,
            **original.measure(out),
            **kept,
        }
        shutil.rmtree(out)
        bits = llama_checkpoint(work, kind, llama, found, out)
        yield {
            "scheme": kind,
            "variant": "llama.cpp",
            **original.about,
            **original.measure(out),
            "bits_per_weight": round(bits, 4),
        }
        shutil.rmtree(out)
        gc.collect()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("layers", "models"))
    parser.add_argument(
        "--source", type=Path, help="checkpoint directory or .gguf file; the demo model where none is given"
    )
    parser.add_argument("--name", help="of the model in the tables; the source's own where none is given")
    parser.add_argument("--calibration", default="self", help="as quality.py takes it")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--text", default="embedded", help="what whole models are evaluated on; an STS .csv file for an encoder"
    )
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument(
        "--types", nargs="+", default=["Q4_0", "Q4_1", "Q4_K", "Q3_K", "Q2_K"], choices=sorted(BLOCK_TYPES)
    )
    parser.add_argument("--only", default="", help="layers: those whose names hold this")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--llama-python", help="has xllamacpp and gguf; made in build/ without it")
    parser.add_argument("--out", type=Path, help="results file; a line of the same measurement is replaced")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    python = llama_python(args.llama_python)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        work = Workload.open(
            args.source or default_source(), args.calibration, args.samples, args.length, args.seed, folder, args.name
        )
        skeleton = Skeleton(open_source(work.source))
        names = skeleton.all_linear_names()
        llama = Llama(python, folder)
        try:
            made = (
                layer_lines(work, args.types, llama, names, args.only)
                if args.part == "layers"
                else model_lines(work, args, llama, names, folder)
            )
            for line in made:
                head = {
                    "benchmark": f"gguf_native_{args.part}",
                    "model": work.name,
                    "windows_sha256": work.windows_sha256,
                    "threads": torch.get_num_threads(),
                }
                lines.show(head | line | provenance(), args.out)
        finally:
            llama.close()


if __name__ == "__main__":
    sys.exit(main())

"""What do several ranks cost and save on one machine? One JSON line for each number of ranks.

    # the demo model
    python benchmarks/ranks.py
    python benchmarks/ranks.py --source DIR --counts 1,2,4 --samples 8 --length 512 --out benchmarks/results/ranks.jsonl
    # how the experts of a mixture are shared out
    python benchmarks/ranks.py --mixture --counts 1,2,4 --samples 16 --length 256 --out benchmarks/results/ranks.jsonl

Each run is started by torchrun (a single rank by Python itself) with one thread a rank, one run after the other, on the
same windows. --twice runs one of the counts a second time: the line then holds both times and says whether the bytes
are the same, by the sha256 of all weight files. Losses are compared with those of the first count, layer by layer.
"sent_bytes" are those that the ranks send each other, memory is the peak of each process, and the KL is that of the
quality gate. "solved" are the linears that each rank solves and the Hessians that it factors, and "solving_cpu_seconds"
its processor's time for both: what falls with the number of ranks even where they share the cores.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers

from common import lines
from common.machine import provenance
from common.quantize_process import own_peak
from common.workload import Workload, default_source
from leangrid.storage import safetensors


class Sent:
    """Counts the bytes of every tensor that this process sends; torch sends objects as tensors too."""

    def __init__(self) -> None:
        self.bytes, self._send, self._isend = 0, dist.send, dist.isend
        dist.send = dist.distributed_c10d.send = self._counted
        dist.isend = self._counted_later

    def _counted(self, tensor: torch.Tensor, *where: Any, **named: Any) -> None:
        self.bytes += tensor.nbytes
        self._send(tensor, *where, **named)

    def _counted_later(self, tensor: torch.Tensor, *where: Any, **named: Any) -> Any:
        self.bytes += tensor.nbytes
        return self._isend(tensor, *where, **named)


class Solving:
    """Counts the linears that this process solves, the Hessians that it factors, and its processor's seconds for
    both."""

    def __init__(self) -> None:
        from leangrid.run import algebra, quantize

        self.linears = self.factors = 0
        self.seconds, self._solve, self._factorize = 0.0, quantize.solve_linear, algebra.factorize
        quantize.solve_linear, algebra.factorize = self._counted_solve, self._counted_factorize

    def _counted_solve(self, *given: Any) -> Any:
        self.linears += 1
        return self._timed(self._solve, *given)

    def _counted_factorize(self, *given: Any) -> Any:
        self.factors += 1
        return self._timed(self._factorize, *given)

    def _timed(self, function: Callable[..., Any], *given: Any) -> Any:
        begin = time.process_time()
        try:
            return function(*given)
        finally:
            self.seconds += time.process_time() - begin


def mixture(folder: Path, samples: int, length: int, seed: int) -> Workload:
    """A random Qwen3-MoE of two blocks with 64 experts of 256 x 512, 8 a token, and random tokens."""
    sizes = {"hidden_size": 512, "moe_intermediate_size": 256, "num_experts": 64, "num_experts_per_tok": 8,
             "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64,
             "vocab_size": 1024, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}  # fmt: skip
    torch.manual_seed(seed)
    model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**sizes))
    model.to(torch.bfloat16).save_pretrained(folder / "source")
    windows, file = torch.randint(1, 1024, (samples, length)), folder / "windows.safetensors"
    safetensors.save(file, {"windows": windows}, {})
    return Workload("random Qwen3-MoE", folder / "source", "random", windows, file, seed)


def worker(job: dict[str, Any]) -> None:
    """One rank: quantize, and write what this process used and got into the job's folder."""
    import leangrid
    from leangrid.cli.progress_bar import Terminal

    rank = os.environ.get("RANK", "0")
    sent, solving = Sent(), Solving()
    windows = safetensors.load(Path(job["windows"]))["windows"]
    begin, processor = time.perf_counter(), time.process_time()
    with Terminal(quiet=rank != "0") as terminal:
        result = leangrid.quantize(
            job["source"],
            job["out"],
            leangrid.Recipe(**job["recipe"]),
            windows=windows,
            threads=1,
            progress=terminal,
        )
    used = {"seconds": round(time.perf_counter() - begin, 2), "cpu_seconds": round(time.process_time() - processor, 2),
            "peak_ram_bytes": own_peak() or result.peak_ram_bytes, "sent_bytes": sent.bytes,
            "solved": {"linears": solving.linears, "factors": solving.factors},
            "solving_cpu_seconds": round(solving.seconds, 2)}  # fmt: skip
    Path(job["folder"], f"{rank}.json").write_text(json.dumps({"used": used, "result": result.to_dict()}))


def run(job: dict[str, Any], count: int, folder: Path) -> list[dict[str, Any]]:
    """Start ``count`` ranks and return what each of them used and got."""
    folder.mkdir()
    torchrun = [] if count == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    told = folder / "job.json"
    told.write_text(json.dumps(job | {"folder": str(folder), "out": str(folder / "out")}))
    done = subprocess.run(
        [sys.executable, *torchrun, __file__, "--worker", str(told)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{count} ranks ended with {done.returncode}")
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]


def hash_weights(out: Path) -> str:
    """The sha256 over the names and bytes of all weight files."""
    digest = hashlib.sha256()
    for path in sorted(out.glob("*.safetensors")):
        digest.update(path.name.encode())
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def read_losses(out: Path) -> dict[str, float]:
    """Name -> loss of every layer."""
    found = (json.loads(line) for line in (out / "records.jsonl").read_text(encoding="utf-8").splitlines())
    return {record["name"]: record["loss"] for record in found}


def summarize(
    runs: list[list[dict[str, Any]]], outs: list[Path], first: tuple[float, dict[str, float]] | None
) -> dict[str, Any]:
    """The figures of one line, from the runs of one count and their results. ``first`` holds the seconds and losses of
    the first count; None for the first count itself."""
    used, result = [rank["used"] for rank in runs[0]], runs[0][0]["result"]
    hashes, mine = [hash_weights(out) for out in outs], read_losses(outs[0])
    figures = {
        "ranks": len(used),
        "seconds": used[0]["seconds"],
        "every_seconds": [ranks[0]["used"]["seconds"] for ranks in runs],
        "cpu_seconds": [rank["cpu_seconds"] for rank in used],
        "busiest_cpu_seconds": max(rank["cpu_seconds"] for rank in used),
        "stages": result["seconds"],
        "peak_ram_bytes": [rank["peak_ram_bytes"] for rank in used],
        "solved": [rank["solved"] for rank in used],
        "solving_cpu_seconds": [rank["solving_cpu_seconds"] for rank in used],
        "busiest_solving_cpu_seconds": max(rank["solving_cpu_seconds"] for rank in used),
        "largest_peak_bytes": max(rank["peak_ram_bytes"] for rank in used),
        "sent_bytes": [rank["sent_bytes"] for rank in used],
        "all_sent_bytes": sum(rank["sent_bytes"] for rank in used),
        "weights_sha256": hashes[0],
        "same_bytes_twice": None if len(hashes) == 1 else len(set(hashes)) == 1,
        "same_twice": "" if len(hashes) == 1 else "yes" if len(set(hashes)) == 1 else "no",
        "loss": result["loss"],
        "quality": result["quality"],
        "layers": result["layers"],
    }
    if first is None:
        return figures
    ratios = sorted(mine[name] / loss for name, loss in first[1].items())
    return figures | {"speedup": round(first[0] / used[0]["seconds"], 2), "loss_ratio_least": round(ratios[0], 4),
                      "loss_ratio_most": round(ratios[-1], 4)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--source", type=Path, help="checkpoint directory or .gguf file; the demo model where none is given"
    )
    parser.add_argument("--mixture", action="store_true", help="a random mixture of 64 experts instead of a source")
    parser.add_argument("--name", help="of the model in the tables; the source's own where none is given")
    parser.add_argument("--calibration", default="embedded")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scheme", default="W4A16_G64")
    parser.add_argument("--counts", default="1,2,4", help="numbers of ranks, with commas between them")
    parser.add_argument("--twice", type=int, default=2, help="the count that is run a second time")
    parser.add_argument("--out", type=Path, help="results file; a line of the same measurement is replaced")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(json.loads(options.worker.read_text()))
        return
    origin = provenance()  # before the minutes in which files may change
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if options.mixture:
            work = mixture(folder, options.samples, options.length, options.seed)
        else:
            source = options.source or default_source()
            work = Workload.open(
                source, options.calibration, options.samples, options.length, options.seed, folder, options.name
            )
        recipe = work.recipe(options.scheme, {})
        job = {
            "source": str(work.source),
            "windows": str(work.windows_file),
            "recipe": recipe.model_dump(exclude={"calibration"}),
        }
        first: tuple[float, dict[str, float]] | None = None
        for count in map(int, options.counts.split(",")):
            folders = [folder / f"{count}-{turn}" for turn in range(2 if count == options.twice else 1)]
            runs = [run(job, count, one) for one in folders]
            figures = summarize(runs, [one / "out" for one in folders], first)
            first = first or (figures["seconds"], read_losses(folders[0] / "out"))
            line = {
                "benchmark": "ranks of experts" if options.mixture else "ranks",
                "model": work.name,
                "scheme": options.scheme,
                "variant": f"{count} rank{'s' * (count > 1)}",
                "length": options.length,
                "windows": options.samples,
                "threads": 1,
                "recipe": recipe.model_dump(),
                "windows_sha256": work.windows_sha256,
                **figures,
            } | origin
            lines.show(line, options.out)


if __name__ == "__main__":
    main()

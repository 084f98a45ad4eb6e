"""leangrid beside GPTQModel, llm-compressor and AutoRound: the same model, token ids, threads and machine, in turns.

    # the demo model, its own samples, Python's documentation
    python benchmarks/race.py
    python benchmarks/race.py --calibration c4.jsonl --text wiki.test.raw --rounds 3 \\
        --schemes W4A16_G64,W4A16,W3A16_G64 --out benchmarks/results/race.jsonl

The environments of the peers are built in .peers/ (about 1.5 GB each, from the package index) unless they are there.
Every quantization is a process of its own, held to the same cores. The entrants take turns (A B C A B C ...), so that a
machine that slows down slows all of them; those that train (AutoRound, --effort best) run in the first round alone.
All get the same windows of token ids, and each peer's runner fails unless its model saw exactly those. All quantize
asymmetrically to the bits and groups of --schemes, with damping 0.01 where they have one; everything else is the
default of each, or is in the line's "recipe". One JSON line for each entrant and scheme:

* seconds: the quantize call alone. leangrid's also reads the checkpoint and writes the result; a peer's model is loaded
  before and saved after. with_files counts loading and saving for all. speedup_over: the seconds of each peer over this
  entrant's, the median of the ratios within each round.
* cpu_seconds: user and system seconds of that call, median of the rounds. peak_ram_bytes: of the whole process, the
  largest of the rounds.
* kl_mean, perplexity: every result by the evaluator of ``leangrid eval``, against the original in float32. The file of
  GPTQModel is dequantized first (common/gptq_file.py). kernel_kl is the distance between a peer's own answer to one
  window and what the evaluator sees: it would show a file that is read wrongly, and above 0.01 it stops the race.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

import leangrid
from common import gptq_file, lines, quantize_process, variants
from common.environment import threads_environment
from common.machine import ROOT, provenance
from common.peer import Peer
from common.quantize_process import Failed
from common.workload import Workload, default_source
from leangrid.errors import LeangridError, RecipeError
from leangrid.evaluation.measure import evaluate_many
from leangrid.schemes import Scheme
from leangrid.storage import safetensors

MAX_KERNEL_KL = 0.01
_GPTQ = {"damping": 0.01, "desc_act": False, "act_group_aware": True, "static_groups": False, "gptaq_alpha": None}
PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gptqmodel": ("gptqmodel", _GPTQ),
    "gptqmodel-gptaq": ("gptqmodel", _GPTQ | {"gptaq_alpha": 0.25}),
    "llmcompressor": ("llmcompressor", {"damping": 0.01, "act_order": "static"}),
    "autoround": ("autoround", {"iterations": 200, "batch_size": 1}),
}
_ROWS = {"desc_act": True, "act_group_aware": False}  # of GPTQModel without groups, which are what the latter orders
OURS = {"leangrid-paper": "paper", "leangrid-fast": "fast", "leangrid": "default", "leangrid-best": "best"}
ONCE = {"autoround", "leangrid-best"}  # what trains takes many times as long as the others


@dataclass(frozen=True)
class Settings:
    """What every entrant is given."""

    work: Workload
    folder: Path
    environments: Path
    threads: int


class Entrant:
    """One quantizer with its settings. ``runs`` holds a measurement for each round; the result of the first round stays
    on disk."""

    def __init__(self, name: str, scheme: Scheme, settings: Settings) -> None:
        self.name, self.settings = name, settings
        self.runs: list[dict[str, Any]] = []
        self._readable: Path | None = None
        self.out = settings.folder / f"{name}-{scheme.name}"
        self.peer = None if name in OURS else Peer(PEERS[name][0], settings.environments)
        if self.peer is None:
            recipe = settings.work.recipe(scheme.name, variants.KNOWN[OURS[name]])
            self.recipe, self._fields = recipe.model_dump(), recipe.model_dump(exclude={"calibration"})
        else:
            form = {"bits": scheme.bits, "group_size": scheme.group_size, "symmetric": scheme.symmetric}
            rows = _ROWS if self.peer.name == "gptqmodel" and scheme.group_size is None else {}
            self.recipe = form | PEERS[name][1] | rows

    @property
    def _answer(self) -> Path:
        """A file for the peer's own answer to the first window."""
        return self.out.with_name(f"{self.out.name}.logits")

    def run(self) -> dict[str, Any]:
        """Quantize once more and add the measurement to ``runs``."""
        out = self.out if not self.runs else self.settings.folder / f"{self.out.name}-{len(self.runs)}"
        begin = time.perf_counter()
        found = self._leangrid(out) if self.peer is None else self._peer(self.peer, out)
        self.runs.append(found | {"process_seconds": round(time.perf_counter() - begin, 3)})
        return self.runs[-1]

    def _leangrid(self, out: Path) -> dict[str, Any]:
        work = self.settings.work
        result = quantize_process.quantize(work.source, out, self._fields, work.windows_file, self.settings.threads)
        seconds = round(result["seconds"]["total"], 3)
        same = {name: result[name] for name in ("cpu_seconds", "process_cpu_seconds", "peak_ram_bytes")}
        return same | {
            "seconds": seconds,
            "with_files": seconds,
            "stages": result["seconds"],
            "kernels": result["kernels"],
        }

    def _peer(self, peer: Peer, out: Path) -> dict[str, Any]:
        work = self.settings.work
        check = "" if self.runs else str(self._answer)
        job = {
            "source": str(work.source.absolute()),
            "out": str(out),
            "windows": str(work.windows_file),
            "threads": self.settings.threads,
            "settings": self.recipe,
            "check": check,
        }
        found = peer.quantize(job, self.settings.folder)
        parts = found.pop("seconds")
        return found | {"seconds": parts["quantize"], "with_files": round(sum(parts.values()), 3), "stages": parts,
                        "cpu_seconds": found["cpu_seconds"]["quantize"]}  # fmt: skip

    def readable(self) -> Path:
        """A directory that the evaluator opens, compared with the peer's own answer; SystemExit where they differ."""
        if self.peer is None or self._readable is not None:
            return self._readable or self.out
        directory = self.out
        if self.peer.name == "gptqmodel":
            directory = self.out.with_name(f"{self.out.name}-dense")
            gptq_file.dequantize(self.out, directory)
        model = leangrid.load(directory, dtype=torch.float32, dense=True)[0]
        window = safetensors.load(self.settings.work.windows_file)["windows"][:1]
        with torch.no_grad():
            ours = model(input_ids=window, use_cache=False).logits[0]
        distance = gptq_file.agreement(ours, safetensors.load(self._answer)["logits"])
        self.runs[0]["kernel_kl"] = distance
        if not distance < MAX_KERNEL_KL:
            raise SystemExit(f"{self.name}: its own answer and its file as we read it differ by KL {distance:g}")
        self._readable = directory
        return directory


def summarize(runs: list[dict[str, Any]], peers: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians over the rounds, and for each of ``peers`` the median of the ratios within a round that both ran in."""
    kept = {
        "seconds": round(median(run["seconds"] for run in runs), 3),
        "rounds_seconds": [run["seconds"] for run in runs],
    }
    for name in ("with_files", "process_seconds", "cpu_seconds"):
        kept[name] = round(median(run[name] for run in runs), 3)
    kept["peak_ram_bytes"] = max(run["peak_ram_bytes"] for run in runs)
    for measure in ("seconds", "with_files", "cpu_seconds"):
        ratios = {
            peer: [theirs[measure] / mine[measure] for mine, theirs in zip(runs, found, strict=False)]
            for peer, found in peers.items()
        }
        kept["speedup_over" if measure == "seconds" else f"speedup_over_{measure}"] = {
            p: round(median(r), 3) for p, r in ratios.items()
        }
    kept["peak_ram_share_of"] = {peer: round(kept["peak_ram_bytes"] / max(run["peak_ram_bytes"] for run in found), 3)
                                 for peer, found in peers.items()}  # fmt: skip
    once_said = ("stages", "tokens_seen", "peer_versions", "kernel_kl", "kernels")
    return kept | {name: runs[0][name] for name in once_said if name in runs[0]}


def limit_threads(threads: int) -> None:
    """Limit this process and all that it starts to the first ``threads`` of its cores, and every math library to as
    many threads."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    os.environ.update(threads_environment(threads))
    torch.set_num_threads(threads)


def still_racing(entrants: list[Entrant], step: Callable[[Entrant], Any]) -> list[Entrant]:
    """Those with which ``step`` went well; what another one said is printed, and the others go on without it."""
    left: list[Entrant] = []
    for entrant in entrants:
        try:
            step(entrant)
        except (SystemExit, Failed, LeangridError) as error:
            print(f"{entrant.name} is out of the race: {error}", file=sys.stderr, flush=True)
            continue
        left.append(entrant)
    return left


def evaluate_results(entrants: list[Entrant], options: argparse.Namespace) -> list[dict[str, Any]]:
    """KL and perplexity of the first result of each, by one evaluator on one text."""
    readable: list[str | Path] = [entrant.readable() for entrant in entrants]
    found = evaluate_many(
        readable, entrants[0].settings.work.source, options.text, length=options.length, windows=options.windows
    )
    names = (
        "sha256_of_text",
        "length",
        "windows",
        "tokens",
        "perplexity",
        "reference_perplexity",
        "kl_mean",
        "kl_p99",
        "top1_agreement",
    )
    sizes = [sum(file.stat().st_size for file in entrant.out.glob("*.safetensors")) for entrant in entrants]
    text = Path(options.text).name
    return [{"text": text, "weight_bytes": size} | {name: getattr(evaluation, name) for name in names}
            for size, evaluation in zip(sizes, found, strict=True)]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--source", type=Path, help="checkpoint directory or .gguf file; the demo model where none is given"
    )
    parser.add_argument("--name", help="of the model in the tables; the source's own where none is given")
    parser.add_argument("--calibration", default="self", help="self, embedded, c4, wikitext2, or a .txt/.jsonl file")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument(
        "--length", type=int, default=1024, help="tokens of a calibration window, and of an evaluation window"
    )
    parser.add_argument("--schemes", default="W4A16_G64", help="affine ones, with commas between them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", default="embedded", help="what is evaluated on")
    parser.add_argument("--windows", type=int, default=12, help="of the evaluation")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers", default=",".join(PEERS), help="with commas between them; none: leangrid alone")
    parser.add_argument("--ours", default="leangrid-fast,leangrid,leangrid-best", help=f"some of {', '.join(OURS)}")
    parser.add_argument("--environments", type=Path, default=ROOT / ".peers", help="where the peers are installed")
    parser.add_argument("--out", type=Path, help="results file; a line of the same measurement is replaced")
    options = parser.parse_args()
    peers, ours = (
        [name for name in names.split(",") if name and name != "none"] for names in (options.peers, options.ours)
    )
    for names, known in ((peers, PEERS), (ours, OURS)):
        if unknown := set(names) - known.keys():
            parser.error(f"not known: {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    try:
        schemes = [Scheme.parse(text) for text in options.schemes.split(",")]
    except RecipeError as error:
        parser.error(str(error))
    if any(scheme.grid != "affine" or scheme.method != "leanquant" for scheme in schemes):
        parser.error("--schemes are affine ones such as W4A16_G64, W4A16: the formats that all of them write")
    if options.rounds < 1 or options.threads < 1:
        parser.error("--rounds and --threads are at least 1")
    for name in dict.fromkeys(PEERS[peer][0] for peer in peers):
        Peer(name, options.environments.absolute()).build()
    origin = provenance()  # of the whole machine, before this process keeps to a part of it
    limit_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        work = Workload.open(
            options.source or default_source(),
            options.calibration,
            options.samples,
            options.length,
            options.seed,
            folder,
            options.name,
        )
        settings = Settings(work, folder, options.environments.absolute(), options.threads)
        out = 0
        for scheme in schemes:
            out += run(options, [Entrant(name, scheme, settings) for name in (*ours, *peers)], scheme.name, origin)
    if out:
        raise SystemExit(f"{out} did not finish: their reasons are above, all other lines are right")


def run(options: argparse.Namespace, entrants: list[Entrant], scheme: str, origin: dict[str, Any]) -> int:
    """All rounds at one scheme, then the evaluation, then the lines; how many entrants have none."""
    work, began, turn = entrants[0].settings.work, len(entrants), 0

    def take_turn(entrant: Entrant) -> None:
        if turn and entrant.name in ONCE:
            return
        found = entrant.run()
        seconds = f"{found['seconds']:.1f} s, {found['cpu_seconds']:.1f} CPU s"
        print(f"{scheme}, round {turn + 1}: {entrant.name} {seconds}", file=sys.stderr, flush=True)

    for turn in range(options.rounds):  # noqa: B007  take_turn reads it
        entrants = still_racing(entrants, take_turn)
    entrants = still_racing(entrants, Entrant.readable)
    measured = evaluate_results(entrants, options) if entrants else []
    for entrant, quality in zip(entrants, measured, strict=True):
        rivals = {other.name: other.runs for other in entrants if other.peer is not None and other is not entrant}
        line = {
            "benchmark": "race",
            "model": work.name,
            "scheme": scheme,
            "variant": entrant.name,
            "rounds": len(entrant.runs),
            "recipe": entrant.recipe,
            "windows_sha256": work.windows_sha256,
            "calibration_tokens": work.windows.numel(),
            "threads": options.threads,
            **quality,
            **summarize(entrant.runs, rivals),
        } | origin
        lines.show(line, options.out)
    return began - len(entrants)


if __name__ == "__main__":
    main()

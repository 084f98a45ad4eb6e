"""How near does each scheme stay to the original? One JSON line for each scheme and variant, on stdout and in --out.

    python benchmarks/quality.py                                          # the demo model, its own samples, Python's documentation
    python benchmarks/quality.py --source DIR --calibration c4.jsonl --samples 16 --length 1024 --text wiki.test.raw --windows 12 \\
        --schemes W4A16_G64,NU4 --variants default,nocorrect,norefine,paper --out benchmarks/results/quality.jsonl

A causal model is measured by perplexity, KL per token and top-1 agreement on the first windows x length tokens of the text (Frantar
procedure); an encoder by the STS Benchmark (--text sts-test.csv). The original is run once for all. Each quantization runs in a process
of its own, with the same calibration windows. A baseline (GPTQ..., RTN...) skips the variants that do not change it.
"""

import argparse
import gc
import hashlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import lines
import numpy as np
import once
import sts
import torch
import variants
from machine import provenance
from torch import Tensor
from workload import Workload, default_source

import leangrid
from leangrid.data.calibration import affixes, check_vocabulary, cut, tokenize
from leangrid.data.corpora import joined
from leangrid.evaluate.divergence import Reference, divergence
from leangrid.evaluate.perplexity import negative_log_likelihood, perplexity
from leangrid.evaluate.sts import Pairs, embed
from leangrid.recipe import Recipe, Scheme

Tasks = Iterable[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]  # of keep_each
_SCHEMES = "W4A16_G64,GPTQ4_G64,W3A16_G64,GPTQ3_G64,NU4,NU3"


class Yardstick(Protocol):
    """The original, ready to have results compared with it; ``about`` says on what, ``figures`` measures one result."""

    about: dict[str, Any]

    def figures(self, directory: Path) -> dict[str, Any]: ...


class Causal:
    """Next-token figures, by the functions of ``leangrid eval``, with the original's log-probabilities kept."""

    def __init__(self, model: Any, tokenizer: Any, text: str, windows: int, length: int, device: str = "cpu") -> None:
        self.device = device
        whole, around = joined(text), affixes(tokenizer)
        ids = tokenize(tokenizer, whole, around)
        self.windows = cut(ids, length, around)[:windows].clone()
        if len(self.windows) < windows:
            raise SystemExit(f"{text}: {len(ids)} tokens are {len(self.windows)} windows of {length}, {windows} are asked for")
        check_vocabulary(self.windows, model.get_input_embeddings().weight.shape[0])
        self.reference = Reference(self._logits(model), self.windows)
        self.about = {"text": Path(text).name, "sha256_of_text": hashlib.sha256(whole.encode("utf-8", "surrogatepass")).hexdigest(),
                      "length": length, "windows": windows, "tokens": windows * (length - 1),
                      "reference_perplexity": perplexity(self.reference.nll)}  # fmt: skip

    def figures(self, directory: Path) -> dict[str, Any]:
        return self.of(opened(directory, self.device)[0])

    @torch.no_grad()
    def of(self, model: Any) -> dict[str, Any]:
        """The figures of a model that is open."""
        logits = self._logits(model)
        nll, kl, agrees = [], [], []
        for index, window in enumerate(self.windows):
            found = logits(window)
            compared = divergence(self.reference.log_probs(index), found)
            nll.append(negative_log_likelihood(found, window))
            kl.append(compared.kl)
            agrees.append(compared.agrees)
        every = torch.cat(kl).numpy()
        return {"perplexity": perplexity(torch.cat(nll)), "kl_mean": float(every.mean()), "kl_p99": float(np.quantile(every, 0.99)),
                "kl_stderr_of_windows": float(np.std([float(part.mean()) for part in kl]) / len(kl) ** 0.5),
                "top1_agreement": float(torch.cat(agrees).double().mean())}  # fmt: skip

    def _logits(self, model: Any) -> Any:
        @torch.no_grad()
        def logits(window: Tensor) -> Tensor:
            return model(input_ids=window[None].to(model.device), use_cache=False).logits[0].float().cpu()

        return logits


class Encoder:
    """STS Benchmark figures, with the original's embeddings kept."""

    def __init__(self, model: Any, tokenizer: Any, text: str) -> None:
        if not text.endswith(".csv"):
            raise SystemExit("an encoder is measured on the STS Benchmark: --text sts-test.csv")
        self.pairs = Pairs.read(Path(text))
        self.original = embed(model, tokenizer, self.pairs.sentences)
        self.about = {"text": Path(text).name, "sha256_of_text": self.pairs.sha256, "sentences": len(self.pairs.sentences),
                      "reference_sts_spearman": sts.figures(self.original, self.pairs, None)["sts_spearman"]}  # fmt: skip

    def figures(self, directory: Path) -> dict[str, Any]:
        model, tokenizer = opened(directory)
        return sts.figures(embed(model, tokenizer, self.pairs.sentences), self.pairs, self.original)


def opened(directory: Path, device: str = "cpu") -> tuple[Any, Any]:
    """Model and tokenizer, dense: float32 on a CPU, where rounding would be measured too, else as stored."""
    return leangrid.load(directory, device=device, dtype=torch.float32 if device == "cpu" else None, dense=True)


def yardstick(source: Path, text: str, windows: int, length: int, device: str = "cpu") -> Yardstick:
    model, tokenizer = opened(source, device)
    if tokenizer is None:
        raise SystemExit(f"{source} has no tokenizer")
    return Causal(model, tokenizer, text, windows, length, device) if model.can_generate() else Encoder(model, tokenizer, text)


def runs(work: Workload, schemes: list[str], chosen: dict[str, dict[str, str]]) -> Iterator[tuple[str, Recipe]]:
    """Every (variant, resolved recipe), without those that would repeat the work of an earlier one of their scheme."""
    for scheme in schemes:
        seen: set[str] = set()
        for name, fields in chosen.items():
            recipe = work.recipe(scheme, fields)
            if variants.does(recipe) in seen:
                continue
            seen.add(variants.does(recipe))
            baseline = Scheme.parse(scheme).method != "leanquant" and not fields.keys() & {"correct", "refine"}
            yield ("default" if baseline else name), recipe


def measured(work: Workload, yard: Yardstick, recipe: Recipe, folder: Path, threads: int | None) -> dict[str, Any]:
    """Quantize, measure, delete."""
    out = folder / "out"
    result = once.quantize(work.source, out, recipe.model_dump(exclude={"calibration"}), work.windows_file, threads)
    begin = time.perf_counter()
    figures = yard.figures(out)
    gc.collect()
    shutil.rmtree(out)
    kept = (
        "bits_per_weight",
        "bytes",
        "layers",
        "loss",
        "loss_minmax",
        "loss_rounding",
        "rescues",
        "notes",
        "seconds",
        "peak_ram_bytes",
        "kernels",
    )
    return figures | {name: result[name] for name in kept} | {"evaluate_seconds": round(time.perf_counter() - begin, 1)}


def keep_each(tasks: Tasks, out: Path | None) -> None:
    """Measure one after another, print each line and keep it in ``out``. What failed does not stop the rest; it is told at the end, exit 1.

    Args:
        tasks: a line's first fields, scheme and variant among them, and what measures the others.
    """
    failed = []
    for head, measure in tasks:
        try:
            line = head | measure() | provenance()
        except once.Failed as error:
            failed.append(f"{head['variant']} {error}")
            continue
        print(lines.text(line), flush=True)
        if out:
            lines.add(out, line)
    if failed:
        sys.exit("\n".join(failed))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, help="checkpoint directory or .gguf file; the demo model where none is given")
    parser.add_argument("--name", help="of the model in the tables; the source's own where none is given")
    parser.add_argument("--calibration", default="self", help="self, embedded, c4, wikitext2, a .txt/.jsonl file, or an STS .csv file")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a calibration window, and of an evaluation window")
    parser.add_argument("--evaluation-length", type=int, help="tokens of an evaluation window, where it is another")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", default="embedded", help="what is evaluated on; an STS .csv file for an encoder")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--schemes", default=_SCHEMES, help="with commas between them")
    parser.add_argument("--variants", nargs="+", default=["default", "paper"], help=f"{', '.join(variants.KNOWN)}, or NAME:FIELD=VALUE,...")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, help="results file; a line of the same measurement is replaced")
    parser.add_argument("--skip-done", action="store_true", help="leave out what --out already has (made by any version of the code)")
    options = parser.parse_args()
    chosen = variants.parse(options.variants)
    if options.threads:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = options.source or default_source()
        work = Workload.open(source, options.calibration, options.samples, options.length, options.seed, folder, options.name)
        todo = list(runs(work, [scheme for scheme in options.schemes.split(",") if scheme], chosen))  # a wrong scheme is told now
        yard = yardstick(work.source, options.text, options.windows, options.evaluation_length or options.length)
        origin = provenance()
        done = {lines.identity(line) for line in lines.read(options.out)} if options.out and options.skip_done else set()

        def tasks() -> Tasks:
            for number, (variant, recipe) in enumerate(todo, 1):
                head = {"benchmark": "quality", "model": work.name, "scheme": recipe.scheme, "variant": variant,
                        "recipe": recipe.model_dump(), "windows_sha256": work.windows_sha256,
                        "threads": options.threads or torch.get_num_threads(), **yard.about}  # fmt: skip
                print(f"{number} of {len(todo)}: {recipe.scheme} {variant}", file=sys.stderr, flush=True)
                if lines.identity(head | origin) not in done:
                    yield head, partial(measured, work, yard, recipe, folder, options.threads)

        keep_each(tasks(), options.out)


if __name__ == "__main__":
    main()

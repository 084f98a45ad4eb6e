"""Whole models: quantized by a recipe, measured on every text of their subject. Most experiments are lists of them."""

import json
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from common import lines, quantize_process
from common.machine import ROOT
from common.original import CausalOriginal, open_dense, open_original
from common.workload import Workload
from leangrid.recipe import Recipe
from leangrid.storage.hub import locate_source
from measure.sizes import Size, Subject

RESULTS = ROOT / "experiments" / "results"
# Of the fields of a line, those that say what was measured; two experiments that ask for the same share one run.
_SAME = ("model", "scheme", "recipe", "length", "windows")
_KEPT = ("bits_per_weight", "bytes", "layers", "loss", "loss_minmax", "loss_rounding", "rescues", "notes")
_COST = ("seconds", "peak_ram_bytes", "peak_gpu_bytes", "kernels")
_SHOWN = ("perplexity", "reference_perplexity", "kl_mean", "top1_agreement", "embedding_cosine_mean", "sts_spearman")
# What ``measure`` finds, and where it comes from: all that another experiment's line gives. Its labels stay its own.
_MEASURED = (
    *_SHOWN,
    "distance",
    "texts",
    *_KEPT,
    "losses",
    "calibration_sha256",
    "cost",
    "command",
    "versions",
    "machine",
    "date",
)


class Task(Protocol):
    """One line of an experiment. ``head`` holds the fields that say what is measured; ``measure`` returns the
    others."""

    @property
    def head(self) -> dict[str, Any]: ...
    def measure(self) -> dict[str, Any]: ...


class Measurement(NamedTuple):
    """A task that is a function."""

    head: dict[str, Any]
    work: Any

    def measure(self) -> dict[str, Any]:
        return self.work()


@dataclass(frozen=True, eq=False)
class WholeModel:
    """A subject quantized by a resolved recipe, in a process of its own."""

    head: dict[str, Any]
    bench: "Bench"
    subject: Subject
    recipe: Recipe

    @property
    def out(self) -> Path:
        """The folder of the result, which the next one replaces."""
        return self.bench.folder / "out"

    def quantized(self) -> dict[str, Any]:
        """Quantize into ``out`` and return what ``leangrid quantize --json`` prints."""
        work = self.bench.original(self.subject).workload(self.subject)
        shutil.rmtree(self.out, ignore_errors=True)
        fields = self.recipe.model_dump(exclude={"calibration"})
        return quantize_process.quantize(
            work.source, self.out, fields, work.windows_file, self.bench.threads, self.bench.size.device
        )

    def measure(self) -> dict[str, Any]:
        result, original = self.quantized(), self.bench.original(self.subject)
        begin = time.perf_counter()
        found = (
            original.figures(self.out)
            | {name: result[name] for name in _KEPT}
            | {"losses": sum_by_kind(self.out / "records.jsonl")}
        )
        cost = {name: result.get(name) for name in _COST} | {"threads": self.bench.threads}
        cost["evaluate_seconds"] = round(time.perf_counter() - begin, 1)
        return found | {"calibration_sha256": original.workload(self.subject).windows_sha256, "cost": cost}

    def elsewhere(self) -> dict[str, Any] | None:
        """The figures of another experiment's line of the same recipe, with its command and machine; None where there
        is none."""
        wanted = json.dumps([self.head.get(name) for name in _SAME], sort_keys=True)
        for path in sorted(RESULTS.glob("*.jsonl")):
            for line in lines.read(path):
                if "losses" in line and json.dumps([line.get(name) for name in _SAME], sort_keys=True) == wanted:
                    return {name: line[name] for name in _MEASURED if name in line}
        return None


class Original:
    """The unquantized model of a subject, with its predictions on each text."""

    def __init__(self, bench: "Bench", subject: Subject) -> None:
        self.bench, self.source = bench, locate_source(subject.source)
        self._workloads: dict[Subject, Workload] = {}
        self.source = self.workload(subject).source  # a .gguf file is dequantized here, once
        device = bench.size.device
        self.texts = {label: open_original(self.source, text, subject.windows, subject.evaluation_length, device)
                      for label, text in subject.texts}  # fmt: skip

    def workload(self, subject: Subject) -> Workload:
        """The calibration windows of a subject."""
        if subject not in self._workloads:
            folder = self.bench.folder / f"windows-{subject.name}-{len(self._workloads)}"
            folder.mkdir()
            opened = Workload.open(
                self.source, subject.calibration, subject.samples, subject.length, 0, folder, subject.name
            )
            self._workloads[subject] = opened
        return self._workloads[subject]

    def figures(self, out: Path) -> dict[str, Any]:
        """The figures of the first text, "distance" (KL; of an encoder 1 - cosine), and under "texts" the figures of
        each text."""
        model = None
        found: dict[str, dict[str, Any]] = {}
        for label, text in self.texts.items():
            if isinstance(text, CausalOriginal):
                model = model or open_dense(out, self.bench.size.device)[0]
                found[label] = text.about | text.measure_model(model)
            else:
                found[label] = text.about | text.measure(out)
        first = next(iter(found.values()))
        distance = first.get("kl_mean", first.get("embedding_cosine_mean"))
        return {name: first[name] for name in _SHOWN if name in first} | {"distance": distance, "texts": found}


class Bench:
    """One size, ready to measure. An original is opened once, for the first line that needs it."""

    def __init__(self, size: Size, folder: Path, threads: int | None) -> None:
        self.size, self.folder, self.threads = size, folder, threads or torch.get_num_threads()
        self._originals: dict[str, Original] = {}

    def original(self, subject: Subject) -> Original:
        if subject.name not in self._originals:
            self._originals[subject.name] = Original(self, subject)
        return self._originals[subject.name]

    def whole(
        self, experiment: str, subject: Subject, scheme: str, label: dict[str, Any] | None = None, **fields: Any
    ) -> WholeModel:
        """A task that quantizes ``subject`` by ``scheme`` with these recipe fields. ``label`` holds fields by which the
        tables name it."""
        name = Path(subject.calibration).name
        recipe = Recipe(
            scheme=scheme, calibration=name, samples=subject.samples, length=subject.length, **fields
        ).resolved()
        head = {
            "benchmark": experiment,
            "size": self.size.name,
            "model": subject.name,
            "scheme": scheme,
            **(label or {}),
            "recipe": recipe.model_dump(),
            "length": subject.evaluation_length,
            "windows": subject.windows,
        }
        return WholeModel(head, self, subject, recipe)

    def causal(self) -> Iterator[Subject]:
        """The subjects that predict next tokens."""
        return (subject for subject in self.size.subjects if subject.windows)


def with_calibration(subject: Subject, **changes: Any) -> Subject:
    """The same subject with another calibration."""
    return replace(subject, **changes)


def sum_by_kind(records: Path) -> dict[str, dict[str, float]]:
    """For each kind of linear (q_proj ...) the number of layers and the sums of their losses: ours, min-max GPTQ's and
    that of rounding."""
    sums: dict[str, dict[str, float]] = defaultdict(
        lambda: dict.fromkeys(("layers", "loss", "loss_minmax", "loss_rounding"), 0.0)
    )
    for line in lines.read(records):
        total = sums[line["name"].rpartition(".")[2]]
        total["layers"] += 1
        for name in ("loss", "loss_minmax", "loss_rounding"):
            total[name] += line[name]
    return dict(sums)

"""The model that is quantized, its name in the tables, and one set of calibration windows for all runs."""

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

import leangrid
from common.machine import ROOT
from leangrid.data.calibration import hash_windows, make_windows
from leangrid.data.sampling import sample_windows
from leangrid.evaluation.tasks.sts import Pairs
from leangrid.models.gguf import dequantize, is_gguf
from leangrid.models.tokenizer import load_tokenizer
from leangrid.recipe import Recipe
from leangrid.storage import safetensors

transformers_logging.disable_progress_bar()


@dataclass(frozen=True)
class Workload:
    """A source and the windows that calibrate every run on it. ``windows_file`` holds them for the processes that
    quantize."""

    name: str
    source: Path
    calibration: str
    windows: Tensor
    windows_file: Path
    seed: int

    @classmethod
    def open(
        cls, source: Path, calibration: str, samples: int, length: int, seed: int, folder: Path, name: str | None = None
    ) -> "Workload":
        """Make the windows, and dequantize ``source`` into ``folder`` where it is a .gguf file.

        ``calibration`` is what ``leangrid quantize --calibration`` takes, or an STS Benchmark .csv file, whose
        sentences are shuffled.
        """
        directory, shown = source, source.stem.split(".")[0] if is_gguf(source) else source.resolve().name
        if is_gguf(source):
            directory = folder / "source"
            dequantize(source, directory)
        text = calibration
        if calibration.endswith(".csv"):
            text = str(folder / "sentences.txt")
            Path(text).write_text("\n\n".join(_sentences(Path(calibration), seed)), encoding="utf-8")
        recipe = Recipe(calibration=text, samples=samples, length=length, seed=seed)

        def drawn(samples: int, length: int, seed: int) -> Tensor:
            model, tokenizer = leangrid.load(directory, dtype=torch.float32)
            return sample_windows(model, tokenizer, samples, length, seed)

        tokens = make_windows(recipe, load_tokenizer(directory), drawn)
        file = folder / "windows.safetensors"
        safetensors.save(file, {"windows": tokens}, {})
        return cls(name or shown, directory, Path(calibration).name, tokens, file, seed)

    @property
    def windows_sha256(self) -> str:
        """The hash of the calibration windows that the manifest of a result holds."""
        return hash_windows(self.windows)

    def recipe(self, scheme: str, fields: dict[str, str]) -> Recipe:
        """The resolved recipe of ``scheme`` with these ``fields``."""
        samples, length = self.windows.shape
        return Recipe(
            scheme=scheme, calibration=self.calibration, samples=samples, length=length, seed=self.seed, **fields
        ).resolved()


def default_source() -> Path:
    """The demo model's .gguf file; SystemExit says how to get it where it is missing."""
    found = sorted((ROOT / ".models" / "smollm2").glob("*.gguf"))
    if not found:
        raise SystemExit(".models/smollm2 is not here: make models, or give --source")
    return found[0]


def _sentences(path: Path, seed: int) -> list[str]:
    sentences = Pairs.read(path).sentences
    random.Random(seed).shuffle(sentences)  # noqa: S311  the file is sorted by genre
    return sentences

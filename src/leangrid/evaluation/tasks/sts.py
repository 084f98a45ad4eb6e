"""How well a sentence encoder preserves similarity: STS Benchmark (Cer et al. 2017).

Embeddings are the mean of the last hidden states over a sentence's tokens (what sentence-transformers does for MiniLM).
The figure is the Spearman correlation of cosine and human similarity over the pairs, in points of 100. It varies by a
few tenths of a point between equally good quantizations; the cosine distance from the original's embeddings
(``evaluate`` with a reference) tells two of them apart better."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from leangrid.errors import TaskError
from leangrid.evaluation.opened import Opened
from leangrid.evaluation.tasks.data_files import find_file, read_bytes, read_hub_rows
from leangrid.evaluation.tasks.job import Job, Part, Results, Tasks
from leangrid.metrics.embedding import states

BATCH = 64  # sentences of similar length


def make_job(tasks: Tasks) -> Job:
    """The task ``sts``: the sts-test*.csv of the directory, or the test split from the hub."""
    if tasks.directory is None:
        pairs = Pairs.from_hub().head(tasks.limit)
    else:
        pairs = Pairs.read(find_file("sts", tasks.directory, "sts-test*.csv")).head(tasks.limit)

    def run(subject: Opened, _: Results) -> dict[str, Any]:
        if subject.has_lm_head or subject.tokenizer is None:
            what = "the model is no encoder" if subject.has_lm_head else "the model has no tokenizer"
            raise TaskError(what, f"sts: {type(subject.model).__name__}", "Give a sentence encoder with its tokenizer")
        found = correlation(embed_sentences(subject.model, subject.tokenizer, pairs.sentences, tasks.batch_size), pairs)
        return {"spearman": found, "stderr": None, "n": len(pairs.scores)}

    return Job("sts", [Part("sts", f"sha256 {pairs.sha256}, limit {tasks.limit}", run)], lambda results: results["sts"])


@dataclass(frozen=True)
class Pairs:
    """Sentence pairs, and how similar people found each: more is more similar."""

    first: list[str]
    second: list[str]
    scores: list[float]
    sha256: str

    @classmethod
    def read(cls, path: Path) -> "Pairs":
        """The benchmark's own files: tab-separated, no quoting, score and sentences in columns 5 to 7; TaskError for
        anything else."""
        raw = read_bytes(path)
        rows = [line.split("\t") for line in raw.decode("utf-8", "replace").split("\n") if line.strip()]
        try:
            scores = [float(row[4]) for row in rows]
            pairs = [(row[5].rstrip("\r"), row[6].rstrip("\r")) for row in rows]
        except (IndexError, ValueError) as error:
            way_out = "It is tab-separated: score and sentences stand in columns 5, 6 and 7"
            raise TaskError("this is no file of the STS Benchmark", path, way_out) from error
        return cls._made(pairs, scores, hashlib.sha256(raw).hexdigest(), path)

    @classmethod
    def from_hub(cls) -> "Pairs":
        """The test split from the hub, whose scores are a fifth of the file's (a rank correlation is the same);
        TaskError where it cannot be reached."""
        rows = read_hub_rows("sts", "sentence-transformers/stsb", "test")
        pairs = [(row["sentence1"], row["sentence2"]) for row in rows]
        scores = [float(row["score"]) for row in rows]
        return cls._made(
            pairs, scores, hashlib.sha256(repr((pairs, scores)).encode()).hexdigest(), "sentence-transformers/stsb"
        )

    @classmethod
    def _made(cls, pairs: list[tuple[str, str]], scores: list[float], sha256: str, where: object) -> "Pairs":
        if len(set(scores)) < 2:
            what = f"{len(scores)} pairs with {len(set(scores))} different scores have no correlation"
            raise TaskError(what, where, "Give more pairs")
        return cls([first for first, _ in pairs], [second for _, second in pairs], scores, sha256)

    def head(self, limit: int | None) -> "Pairs":
        """The first ``limit`` pairs."""
        pairs = list(zip(self.first, self.second, strict=True))[:limit]
        return self._made(pairs, self.scores[:limit], self.sha256, "--limit")

    @property
    def sentences(self) -> list[str]:
        """All first sentences, then all second ones."""
        return [*self.first, *self.second]


@torch.no_grad()
def embed_sentences(
    model: Any, tokenizer: Any, sentences: list[str], batch: int = BATCH
) -> Float64[Tensor, "sentences width"]:
    """The mean of the last hidden states over the tokens of each sentence, in the order given."""
    order = sorted(range(len(sentences)), key=lambda index: len(sentences[index]))
    parts = []
    for start in range(0, len(order), batch):
        chosen = [sentences[index] for index in order[start : start + batch]]
        inputs = tokenizer(chosen, padding=True, truncation=True, return_tensors="pt").to(model.device)
        hidden = states(model, **inputs).double()
        mask = inputs["attention_mask"][..., None].double()
        parts.append(((hidden * mask).sum(1) / mask.sum(1)).cpu())
    result = torch.cat(parts)
    return torch.empty_like(result).index_copy_(0, torch.tensor(order), result)


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's rank correlation; equal values have the mean of their ranks."""
    return float(np.corrcoef(_ranks(first), _ranks(second))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return (last - (counts - 1) / 2)[place]


def correlation(embeddings: Float64[Tensor, "sentences width"], pairs: Pairs) -> float:
    """Spearman correlation of cosine and human similarity, in points of 100."""
    left, right = embeddings.split(len(pairs.first))
    return 100 * spearman(torch.cosine_similarity(left, right, dim=-1).numpy(), np.array(pairs.scores))

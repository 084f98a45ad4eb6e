"""How well a sentence encoder keeps its meaning: STS Benchmark, and how far each sentence's embedding turned.

    python benchmarks/sts.py --model DIR [--reference DIR] --pairs sts-test.csv

Embeddings are the mean of the last hidden states over a sentence's tokens (what sentence-transformers does for MiniLM). The Spearman
correlation is between cosine and human similarity over the pairs; it moves by a few tenths of a point by itself. The distance is the
mean over all sentences of 1 - cosine with the original's embedding, and is what ranks two quantizations.
"""

import argparse
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import provenance
from torch import Tensor

import leangrid

_BATCH = 64  # sentences of similar length


@dataclass(frozen=True)
class Pairs:
    """Sentence pairs and how similar people found them (0 to 5)."""

    first: list[str]
    second: list[str]
    scores: list[float]
    sha256: str

    @classmethod
    def read(cls, path: Path) -> "Pairs":
        """The benchmark's own files: tab-separated, no quoting, score and sentences in columns 5 to 7."""
        raw = path.read_bytes()
        rows = [line.split("\t") for line in raw.decode("utf-8").splitlines() if line.strip()]
        return cls([row[5] for row in rows], [row[6] for row in rows], [float(row[4]) for row in rows], hashlib.sha256(raw).hexdigest())

    @property
    def sentences(self) -> list[str]:
        """All first sentences, then all second ones."""
        return [*self.first, *self.second]


@torch.no_grad()
def embed(model: Any, tokenizer: Any, sentences: list[str]) -> Tensor:
    """Mean-pooled last hidden states, float64 [sentences, width], in the order given."""
    order = sorted(range(len(sentences)), key=lambda index: len(sentences[index]))
    result: Tensor | None = None
    for start in range(0, len(order), _BATCH):
        chosen = order[start : start + _BATCH]
        inputs = tokenizer([sentences[index] for index in chosen], padding=True, truncation=True, return_tensors="pt").to(model.device)
        hidden = model(**inputs).last_hidden_state.double()
        mask = inputs["attention_mask"][..., None].double()
        pooled = ((hidden * mask).sum(1) / mask.sum(1)).cpu()
        if result is None:
            result = pooled.new_empty((len(sentences), pooled.shape[1]))
        result[torch.tensor(chosen)] = pooled
    if result is None:
        raise ValueError("no sentences")
    return result


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Rank correlation; equal values share the mean of their ranks."""
    return float(np.corrcoef(_ranks(first), _ranks(second))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return (last - (counts - 1) / 2)[place]


def figures(embeddings: Tensor, pairs: Pairs, original: Tensor | None) -> dict[str, float]:
    """{"sts_spearman", "embedding_cosine_mean"}: points of 100, and the mean of 1 - cosine with the original's embeddings."""
    left, right = embeddings.split(len(pairs.first))
    similarity = torch.cosine_similarity(left, right, dim=-1).numpy()
    found = {"sts_spearman": 100 * spearman(similarity, np.array(pairs.scores))}
    if original is not None:
        found["embedding_cosine_mean"] = float((1 - torch.cosine_similarity(embeddings, original, dim=-1)).mean())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--pairs", type=Path, required=True)
    options = parser.parse_args()
    pairs = Pairs.read(options.pairs)
    original = None
    if options.reference is not None:
        original = embed(*leangrid.load(options.reference, dtype=torch.float32), pairs.sentences)
    found = embed(*leangrid.load(options.model, dtype=torch.float32, dense=True), pairs.sentences)
    line = {"benchmark": "sts", "model": options.model.name, "pairs": len(pairs.scores), "text": options.pairs.name,
            "sha256_of_text": pairs.sha256, **figures(found, pairs, original)}  # fmt: skip
    print(json.dumps(line | provenance()))


if __name__ == "__main__":
    main()

"""How well a sentence encoder keeps its meaning: STS Benchmark, and how far each sentence's embedding turned.

    python benchmarks/sts.py --model DIR [--reference DIR] --pairs sts-test.csv

The Spearman correlation is that of ``leangrid eval --tasks sts``. The distance is the mean over all sentences of 1 - cosine with the
original's embedding, and is what ranks two quantizations.
"""

import argparse
import json
from pathlib import Path

import torch
from machine import provenance
from torch import Tensor

import leangrid
from leangrid.evaluate.embedding import cosine_distance
from leangrid.evaluate.sts import Pairs, correlation, embed


def figures(embeddings: Tensor, pairs: Pairs, original: Tensor | None) -> dict[str, float]:
    """{"sts_spearman", "embedding_cosine_mean"}: points of 100, and the mean of 1 - cosine with the original's embeddings."""
    found = {"sts_spearman": correlation(embeddings, pairs)}
    return found | ({} if original is None else {"embedding_cosine_mean": cosine_distance(embeddings, original)})


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

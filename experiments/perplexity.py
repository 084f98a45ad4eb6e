"""Perplexity on WikiText-2 and C4 by bits and method (the paper's Table 7 and its kin), KL from the original beside it.

Whole rows, as in the paper. "paper" is LeanQuant's plain procedure (p = 4, no correction, no refit, no guard) with the
grid searched to its optimum; "default" is what ``leangrid quantize`` does."""

from collections.abc import Iterator

from common.variants import KNOWN
from measure.whole_model import Bench, Task

METHODS: dict[str, tuple[str, dict[str, str]]] = {
    "rounding": ("RTN{bits}", {}),
    "GPTQ": ("GPTQ{bits}", {}),
    "affine, paper": ("W{bits}A16", KNOWN["paper"]),
    "affine, default": ("W{bits}A16", {}),
    "non-uniform, paper": ("NU{bits}", KNOWN["paper"]),
    "non-uniform, default": ("NU{bits}", {}),
}


def tasks(bench: Bench) -> Iterator[Task]:
    for subject in bench.causal():
        for bits in subject.bits:
            for method, (scheme, fields) in METHODS.items():
                yield bench.whole(
                    "perplexity", subject, scheme.format(bits=bits), {"method": method, "bits": bits}, **fields
                )

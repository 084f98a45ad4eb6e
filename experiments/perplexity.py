"""What is the perplexity on WikiText-2 and C4 by bits and method (the paper's Table 7), and the KL from the original?

Whole rows, as in the paper.
"""

from collections.abc import Iterator

from measure.methods import METHODS
from measure.whole_model import Bench, Task


def tasks(bench: Bench) -> Iterator[Task]:
    for subject in bench.causal():
        for bits in subject.bits:
            for method, (scheme, fields) in METHODS.items():
                yield bench.whole(
                    "perplexity", subject, scheme.format(bits=bits), {"method": method, "bits": bits}, **fields
                )

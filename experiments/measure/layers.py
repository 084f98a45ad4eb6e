"""Weights and Hessians of some blocks of the original model, for experiments that need only layers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from common.hessians import collect_hessians
from common.original import open_dense
from leangrid.grids import Grid
from leangrid.models.skeleton import Skeleton
from leangrid.solve.factor import Factor, factorize
from leangrid.storage.source import open_source
from measure.sizes import Subject
from measure.whole_model import Bench, Measurement, Task


@dataclass(frozen=True, eq=False)
class Layer:
    """``weight`` float32 [rows, cols]; ``matrix``, the undamped Hessian H float32 [cols, cols] of the original's
    inputs; and its factor."""

    name: str
    weight: Tensor
    matrix: Tensor
    factor: Factor

    def objective(self, grid: Grid, weights: Tensor) -> float:
        """sum_j g_j (nearest(w_j) - w_j)^2 over all rows, in float64; ``weights`` is g [cols]."""
        error = grid.dequantize(grid.nearest(self.weight)).double() - self.weight.double()
        return float((error.square() * weights).sum())


def each(
    bench: Bench, benchmark: str, field: str, values: Sequence[Any], measured: Callable[[list[Layer], int, Any], Any]
) -> Iterator[Task]:
    """One task for every subject, 4, 3 and 2 bits, and each of ``values`` in the line's ``field``: ``measured(layers,
    bits, value)`` returns the measured fields."""
    for subject in bench.size.subjects:
        for bits in (4, 3, 2):
            for value in values:
                head = {
                    "benchmark": benchmark,
                    "size": bench.size.name,
                    "model": subject.name,
                    "bits": bits,
                    field: value,
                    "base": {"blocks": list(subject.blocks), "samples": subject.samples, "length": subject.length},
                }
                yield Measurement(head, lambda s=subject, b=bits, v=value: measured(load_layers(bench, s), b, v))


@cache
@torch.no_grad()
def load_layers(bench: Bench, subject: Subject) -> list[Layer]:
    """The linears of the subject's blocks."""
    work = bench.original(subject).workload(subject)
    skeleton = Skeleton(open_source(work.source))
    names = [name for index in subject.blocks for name in skeleton.linear_names(index)]
    model = open_dense(work.source, bench.size.device)[0]
    found: Mapping[str, Any] = collect_hessians(model, names, work.windows)
    layers = []
    for name in names:
        matrix = found[name].matrix
        weight = model.get_submodule(name).weight.detach().float().to(matrix.device)
        layers.append(Layer(name, weight.contiguous(), matrix, factorize(matrix)))
    return layers

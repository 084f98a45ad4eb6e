"""Where should the k-means of a non-uniform grid begin: uniform, k-means++, our start, or no start (the optimum)?

"uniform" and "k-means++" are scikit-learn's Lloyd iteration from that start, one run and one call for each row, as in
the authors' code (it takes the first for up to 8 levels, the second for 16). "lloyd" is ours (``search = "lloyd"``),
"optimal" the dynamic program. The procedure around it is the paper's: p = 4, no refit, no guard. Objectives are
relative to that of the optimum.
"""

from collections.abc import Iterator
from time import process_time
from typing import Any

import numpy as np
import torch
from sklearn.cluster import KMeans
from torch import Tensor

from leangrid.grids import NonuniformGrid, fit_nonuniform
from leangrid.solve.layer import layer_loss
from leangrid.solve.sweep import sweep
from measure.layers import Layer, each
from measure.whole_model import Bench, Task

STARTS = ("uniform", "k-means++", "lloyd", "optimal")
POWER = 4.0


def tasks(bench: Bench) -> Iterator[Task]:
    return each(bench, "start", "variant", STARTS, measure)


def measure(layers: list[Layer], bits: int, start: str) -> dict[str, Any]:
    objective = best = loss = spent = 0.0
    for layer in layers:
        weights = layer.factor.loss_error_weights(POWER)
        begin = process_time()
        grid = fit_from(layer.weight, weights, 2**bits, start)
        spent += process_time() - begin
        objective += layer.objective(grid, weights)
        best += layer.objective(fit_nonuniform(layer.weight, weights, 2**bits), weights)
        codes = sweep(layer.weight, layer.factor, grid).codes
        loss += layer_loss(grid.dequantize(codes), layer.weight, layer.matrix)
    return {"layers": len(layers), "objective": objective / best, "loss": loss, "grid_cpu_seconds": round(spent, 3)}


def fit_from(weight: Tensor, weights: Tensor, levels: int, start: str) -> NonuniformGrid:
    """The grid of a layer by k-means from one start."""
    if start in ("lloyd", "optimal"):
        return fit_nonuniform(weight, weights, levels, start)  # pyright: ignore[reportArgumentType]
    found = torch.empty(len(weight), levels)
    share = weights.cpu().numpy()
    for number, row in enumerate(weight.cpu().double().numpy()):
        init: Any = start if start == "k-means++" else np.linspace(row.min(), row.max(), levels)[:, None]
        centres = (
            KMeans(levels, init=init, n_init=1, random_state=0)
            .fit(row[:, None], sample_weight=share)
            .cluster_centers_[:, 0]
        )
        found[number] = torch.from_numpy(np.sort(centres)).float()
    return NonuniformGrid(found)

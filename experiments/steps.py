"""How many steps T does the affine search need? Grid objective, layer loss after the sweep, CPU seconds.

Over the layers of some blocks, by the paper's procedure: whole rows, p = 4, no refit, no guard. Objectives are relative
to those of T = 2048.
"""

from collections.abc import Iterator
from time import process_time
from typing import Any

from common.variants import KNOWN
from leangrid.grids import fit_affine
from leangrid.recipe import Recipe
from leangrid.solve.layer import solve_linear
from measure.layers import Layer, each
from measure.whole_model import Bench, Task

STEPS = (16, 64, 256, 1024, 2048, 4096)


def tasks(bench: Bench) -> Iterator[Task]:
    return each(bench, "steps", "steps", STEPS, measure)


def measure(layers: list[Layer], bits: int, steps: int) -> dict[str, Any]:
    recipe = Recipe(scheme=f"W{bits}A16", **{**KNOWN["paper"], "steps": str(steps)}).resolved()
    objective = best = loss = minmax = spent = 0.0
    for layer in layers:
        weights = layer.factor.loss_error_weights(recipe.p or 0.0)
        begin = process_time()
        grid = fit_affine(layer.weight, weights, bits, steps)
        spent += process_time() - begin
        objective += layer.objective(grid, weights)
        best += layer.objective(fit_affine(layer.weight, weights, bits), weights)
        result = solve_linear(layer.weight, layer.factor, layer.matrix, recipe)
        loss, minmax = loss + result.loss, minmax + result.loss_minmax
    return {
        "layers": len(layers),
        "objective": objective / best,
        "loss": loss,
        "loss_minmax": minmax,
        "of_minmax": loss / minmax,
        "grid_cpu_seconds": round(spent, 4),
    }

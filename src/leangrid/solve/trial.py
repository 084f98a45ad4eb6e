"""What a linear would lose with other schemes: losses on the same Hessian and factor, of some of its rows.

Rows never interact, so that some of them, evenly spaced, stand for all. A trial is the paper's procedure, without refit
and descent: those take most of the time of a solution and change the losses of all widths alike."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from leangrid.grids import Precision, grid_class
from leangrid.recipe import Recipe
from leangrid.solve.factor import Factor
from leangrid.solve.layer import layer_loss
from leangrid.solve.sweep import sweep

ROWS = 128  # of a linear that are tried


def trial_losses(
    target: Float[Tensor, "rows cols"],
    factor: Factor,
    hessian: Float[Tensor, "cols cols"],
    recipes: Sequence[Recipe],
    precision: Precision,
) -> Float[Tensor, "recipes 2"]:
    """The layer losses tr(E H E^T) / 2 of a linear by several schemes, float64, on the CPU.

    Args:
        target: the weights, any float dtype.
        factor: of ``hessian``.
        hessian: H undamped, float32, original column order.
        recipes: one for each scheme, resolved.
        precision: of the container.

    Returns:
        For each recipe the loss of its method's solution, and that of plain rounding on its min-max grid; estimated for
        all rows from at most ``ROWS`` of them.
    """
    count = min(ROWS, len(target))
    rows = torch.arange(count, device=target.device) * len(target) // count
    part = target[rows].float().contiguous()
    losses = torch.zeros(len(recipes), 2, dtype=torch.float64)
    for number, recipe in enumerate(recipes):
        scheme = recipe.scheme_for(part.shape[1])
        stored, kind = precision.for_scheme(scheme), grid_class(scheme)
        minmax = kind.fit_minmax(part, scheme, stored)
        rounding = layer_loss(minmax.dequantize(minmax.nearest(part)), part, hessian)
        solved = rounding
        if scheme.method != "rtn":
            grid = minmax
            if scheme.method == "leanquant":
                weights = factor.loss_error_weights(recipe.exponent)
                grid = kind.fit(part, weights, scheme, recipe, stored)
            solved = layer_loss(grid.dequantize(sweep(part, factor, grid).codes), part, hessian)
        # As a run does, which replaces what is worse than rounding.
        losses[number, 0], losses[number, 1] = min(solved, rounding), rounding
    return losses * (len(target) / count)

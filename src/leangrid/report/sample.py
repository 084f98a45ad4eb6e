"""One row of one layer, kept when the run solves it: weights, what an error costs at each, learned levels. The paper's
Figure 1, here.

The finished files have codes and levels but neither the original weights nor the Hessian, so the figure's numbers are
kept at the moment that has all of them: at most ``POINTS`` columns, some 20 kB."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from leangrid.grids import Precision
from leangrid.models.skeleton import Skeleton
from leangrid.recipe import Recipe
from leangrid.solve.factor import Factor
from leangrid.solve.layer import LinearResult, minmax_grid

POINTS = 768
_HEAVIEST = POINTS // 4


def sampled_layer(skeleton: Skeleton) -> str:
    """The last linear of the middle block: in a decoder the one that reads the MLP's hidden units, where outliers
    live."""
    return skeleton.linear_names(len(skeleton.blocks) // 2)[-1]


def sample_of(
    name: str, weight: Float[Tensor, "rows cols"], result: LinearResult, factor: Factor, recipe: Recipe
) -> dict[str, Any]:
    """What run.json keeps of a solved layer: JSON values.

    The row is the one whose range of weights is the layer's median; of a grid with groups, the group with the costliest
    column. Of more than ``POINTS`` columns the costliest quarter of ``POINTS`` is kept, and an even choice of the rest.

    Args:
        weight: the original weights, before the correction of the inputs' error.
        recipe: of this layer, resolved.

    Returns:
        name, row, columns (first, last and how many), p; ``weights`` and ``stored`` (what the file holds), ``costs`` =
        g_j = U_jj^-p over its largest in the layer, each per kept column; ``levels`` and ``levels_minmax``, ascending.
    """
    cols, span = weight.shape[1], weight.amax(1).float() - weight.amin(1).float()
    row = int(span.argsort()[len(span) // 2])
    power = recipe.p if recipe.p is not None else 4.0
    costs = factor.loss_error_weights(power).cpu()
    group = result.grid.group_of(cols).cpu()
    inside = (group == group[int(costs.argmax())]).nonzero().squeeze(1)
    values = weight[row].float().cpu()
    kept = inside[_kept(costs[inside])]
    grid = result.grid.take(torch.tensor([row], device=result.codes.device))
    levels = grid.levels.cpu().reshape(-1, grid.levels.shape[-1])[int(group[inside[0]])]
    minmax = minmax_grid(
        values[None], recipe.scheme_for(cols), Precision(torch.float32)
    )  # not rounded to what a container stores
    stored = grid.dequantize(result.codes[row : row + 1])[0].float().cpu()
    return {
        "name": name,
        "row": row,
        "columns": [int(inside[0]), int(inside[-1]), len(inside)],
        "p": power,
        "weights": _short(values[kept]),
        "stored": _short(stored[kept]),
        "costs": _short(costs[kept]),
        "levels": _short(levels.unique()),
        "levels_minmax": _short(minmax.levels[0, int(group[inside[0]])].unique()),
    }


def _kept(costs: Float[Tensor, " cols"]) -> Tensor:
    """Ascending positions of the columns that are kept."""
    order = costs.argsort(descending=True)
    if len(order) <= POINTS:
        return order.sort().values
    rest = order[_HEAVIEST:].sort().values
    even = torch.linspace(0, len(rest) - 1, POINTS - _HEAVIEST).round().long()
    return torch.cat((order[:_HEAVIEST], rest[even])).sort().values


def _short(values: Tensor) -> list[float]:
    """Four digits: enough for a figure."""
    return [float(f"{value:.4g}") for value in values.tolist()]

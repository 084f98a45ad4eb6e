"""One row of one layer as the report shows it: its weights, what an error at each costs, and the learned levels (the
paper's Figure 1 for this model).

The finished files have codes and levels but neither the original weights nor the Hessian, so the numbers of the figure
are taken when the layer is solved: at most ``POINTS`` columns, some 20 kB."""

from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from leangrid.grids import Precision, grid_class
from leangrid.grids.base import Grid
from leangrid.models.skeleton import Skeleton
from leangrid.recipe import Recipe
from leangrid.solve.factor import FactorSummary
from leangrid.solve.layer import LinearResult

POINTS = 768
_HEAVIEST = POINTS // 4


def choose_sampled_layer(skeleton: Skeleton) -> str:
    """The name of the last linear of the middle one of the blocks that have any: in a decoder the one that reads the
    hidden units of the MLP, which have outliers."""
    names = [names for index in range(len(skeleton.blocks)) if (names := skeleton.linear_names(index))]
    return names[len(names) // 2][-1]


def sample_row(
    name: str, weight: Float[Tensor, "rows cols"], result: LinearResult, factor: FactorSummary, recipe: Recipe
) -> dict[str, Any]:
    """The sample of a solved layer, as JSON values; ``update_sample`` brings it up to date when its grid changes.

    The row is the one whose range of weights is the layer's median; of a grid with groups, the group with the costliest
    column. Of more than ``POINTS`` columns the costliest ``POINTS`` / 4 are shown, and an even choice of the others.

    Args:
        name: the layer's name.
        weight: the original weights, before the correction of the inputs' error.
        result, factor: of this layer.
        recipe: of this layer, resolved.

    Returns:
        name, row, columns (first, last and how many), p; for each shown column ``weights``, ``stored`` (the value in
        the file) and ``costs``: U_jj^-p divided by its largest value in the layer; ``levels`` and ``levels_minmax``,
        ascending; ``shown``, the numbers of the shown columns, only where ``recipe`` will change the grid later.
    """
    cols, span = weight.shape[1], weight.amax(1).float() - weight.amin(1).float()
    row = int(span.argsort()[len(span) // 2])
    power = recipe.exponent
    costs = factor.loss_error_weights(power)
    group = result.grid.group_of(cols).cpu()
    inside = (group == group[int(costs.argmax())]).nonzero().squeeze(1)
    values = weight[row].float().cpu()
    shown = inside[_choose_columns(costs[inside])]
    grid = result.grid.select_rows(torch.tensor([row], device=result.codes.device))
    levels = grid.levels.cpu().reshape(-1, grid.levels.shape[-1])[int(group[inside[0]])]
    scheme = recipe.scheme_for(cols)
    minmax = grid_class(scheme).fit_minmax(
        values[None], scheme, Precision(torch.float32)
    )  # not as a container rounds it
    stored = grid.dequantize(result.codes[row : row + 1])[0].float().cpu()
    return {
        "name": name,
        "row": row,
        "columns": [int(inside[0]), int(inside[-1]), len(inside)],
        "p": power,
        "weights": _short(values[shown]),
        "stored": _short(stored[shown]),
        "costs": _short(costs[shown]),
        "levels": _short(levels.unique()),
        "levels_minmax": _short(minmax.levels[0, int(group[inside[0]])].unique()),
        **({"shown": shown.tolist()} if recipe.finish else {}),
    }


def update_sample(sample: dict[str, Any], codes: UInt8[Tensor, "rows cols"], grid: Grid) -> dict[str, Any]:
    """The ``sample`` of a layer whose ``codes`` and ``grid`` are others now."""
    row, shown = torch.tensor([sample["row"]], device=codes.device), torch.tensor(sample["shown"])
    own = grid.select_rows(row)
    group = int(grid.group_of(codes.shape[1])[shown[0]])
    levels = own.levels.cpu().reshape(-1, own.levels.shape[-1])[group]
    stored = own.dequantize(codes[row])[0].float().cpu()
    return sample | {"stored": _short(stored[shown]), "levels": _short(levels.unique())}


def _choose_columns(costs: Float[Tensor, " cols"]) -> Tensor:
    """Ascending positions of the columns that are shown."""
    order = costs.argsort(descending=True)
    if len(order) <= POINTS:
        return order.sort().values
    rest = order[_HEAVIEST:].sort().values
    even = torch.linspace(0, len(rest) - 1, POINTS - _HEAVIEST).round().long()
    return torch.cat((order[:_HEAVIEST], rest[even])).sort().values


def _short(values: Tensor) -> list[float]:
    """Four digits: enough for a figure."""
    return [float(f"{value:.4g}") for value in values.tolist()]

"""Bytes of what is done by gradient: a block that is tuned, what guides it, and the whole model that is finished."""

from leangrid.planning.demand import Demand
from leangrid.planning.placement import Placement
from leangrid.solve.tuning import count_step_windows

_F32 = 4
# Bytes a weight of block tuning: the code with a fraction, Adam's two means, both gradients and the weight in float32,
# and the code; the original and the tuned weight as they are computed come on top.
_TUNED, _TUNED_WEIGHTS = 6 * 4 + 1, 2
# Of one weight at a time while the whole model is finished: its gradient and two tensors made of it.
_GRADIENT = 3
_LOGITS = 4  # tensors as large as the logits: two models', a gradient, one on its way
# Numbers of each input and output of a linear that a pass keeps for its gradient: through a block whose codes move,
# through a model whose grids alone do, and by the states between blocks alone.
_KEPT_FOR_GRADIENT, _KEPT_FOR_GRIDS, _KEPT_FOR_STATES = 3, 2, 1


def tuning_parts(demand: Demand) -> dict[str, int]:
    """One batch forward and backward, with everything that a weight of the block carries along; the states that
    entered the block wait beside those that leave it."""
    numbers = sum(group.rows * group.cols for group in demand.groups)
    through = sum(group.rows + group.cols for group in demand.groups) + 2 * demand.hidden
    tokens = count_step_windows(demand.samples, demand.length) * demand.length
    return {
        "codes, grids and their steps": numbers * (_TUNED + _TUNED_WEIGHTS * demand.itemsize),
        "one batch's gradient": _KEPT_FOR_GRADIENT * through * tokens * demand.itemsize,
        "states that entered": demand.states // demand.streams,
    }


def drawing_parts(demand: Demand, waiting: int) -> dict[str, int]:
    """One batch forward and backward through the whole original model, for the gradients at its blocks' outputs;
    ``waiting``: bytes of those of all windows."""
    through = sum(group.rows + group.cols for group in demand.groups) + 2 * demand.hidden
    tokens = count_step_windows(demand.samples, demand.length) * demand.length
    return {
        "the whole model": demand.whole,
        "one batch's gradient": demand.blocks * _KEPT_FOR_STATES * through * tokens * demand.itemsize,
        "logits": _LOGITS * tokens * demand.vocabulary * _F32 if demand.has_lm_head else 0,
        "drawn gradients": waiting,
    }


def finishes_by_blocks(placement: Placement, live: bool) -> bool:
    """Whether the whole model is finished with one block's weights at once, each block twice a step: where forward
    passes are replayed too, and nothing but hidden states flows between the blocks (``live``: something does)."""
    return placement.replay and not live


def finishing_parts(demand: Demand, by_blocks: bool) -> dict[str, int]:
    """One batch forward and backward through the whole model, beside its own weights; no streams wait any more."""
    at_once = 1 if by_blocks else demand.blocks
    through = sum(group.rows + group.cols for group in demand.groups) + 2 * demand.hidden
    tokens = count_step_windows(demand.samples, demand.length) * demand.length
    logits = _LOGITS * tokens * demand.vocabulary * demand.itemsize if demand.has_lm_head else 0
    weights = demand.finished * at_once // demand.blocks * (_F32 + (demand.itemsize if demand.itemsize < _F32 else 0))
    between = demand.blocks * demand.hidden if by_blocks else 0
    return {
        "the whole model": demand.whole,
        "codes, grids and weights": demand.finished + weights,
        "one batch's gradient": (at_once * _KEPT_FOR_GRIDS * through + between) * tokens * demand.itemsize,
        "a weight's gradient": _GRADIENT * _F32 * max(group.tallest * group.cols for group in demand.groups),
        "logits": logits,
    }

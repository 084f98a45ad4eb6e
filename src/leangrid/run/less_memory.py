"""What a run does when memory runs out in a block: the block begins again with the next smaller placement."""

import gc
from dataclasses import replace

from leangrid.data.windows import Windows
from leangrid.errors import Interrupted
from leangrid.machine.devices import has_own_memory, release_cached_memory
from leangrid.models.flow import flows_live
from leangrid.models.skeleton import Skeleton
from leangrid.planning.demand import Demand
from leangrid.planning.footprint import sum_footprint
from leangrid.planning.placement import Placement
from leangrid.recipe import Recipe


def reduce_placement(
    placement: Placement,
    stage: tuple[str, int],
    skeleton: Skeleton,
    recipe: Recipe,
    windows: Windows,
    index: int,
    device: str,
) -> tuple[Placement, str]:
    """The next smaller placement after block ``index`` ran out of memory, and the change in words.

    Args:
        stage: name of the stage in which it ran out, and the number of the group at work: in "calibrate" it was a
            forward pass, else the algebra of that group.
        windows: the calibration tokens, int64 [samples, length], or rows with pictures.

    Raises:
        Interrupted: there is no smaller placement.
    """
    gc.collect()
    release_cached_memory(device)
    name, group = stage
    failed = "forward" if name == "calibrate" else "algebra"
    steps = 1 if recipe.holds_out else placement.windows  # the windows of a step of tuning stay together
    asked = replace(placement, windows=steps)
    smaller = asked.next_smaller(failed, group, len(skeleton.groups(index)), has_own_memory(device))
    if smaller is not None and recipe.holds_out:
        smaller = replace(smaller[0], windows=placement.windows), smaller[1]
    if smaller is not None and smaller[0].host_block and flows_live(skeleton):
        smaller = None  # what the model's own forward holds stays on the device
    if smaller is None:
        samples, length = windows.shape
        needed = sum_footprint(Demand.of(skeleton, recipe, samples, length, device), placement).peak
        raise Interrupted(
            f"out of memory, and no smaller way is left: a block needs about {needed / 2**30:.2f} GiB",
            skeleton.block_name(index),
            "Finished blocks are kept: free memory, or go on with more of it",
        )
    return smaller

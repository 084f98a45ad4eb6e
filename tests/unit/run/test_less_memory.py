"""Which smaller placement follows when a stage runs out of memory, and that the last one is followed by a sentence."""

from pathlib import Path

import pytest
import tiny_models

from leangrid.errors import Interrupted
from leangrid.models.skeleton import Skeleton
from leangrid.planning.placement import Placement
from leangrid.recipe import Recipe
from leangrid.run.less_memory import reduce_placement
from leangrid.storage.source import open_source


def test_a_forward_pass_takes_fewer_windows_and_algebra_another_way(tmp_path: Path) -> None:
    skeleton = Skeleton(open_source(tiny_models.save("llama2", tmp_path)))
    recipe, windows = Recipe(scheme="NU4").resolved(), tiny_models.tokens(4, 16)

    def reduced(placement: Placement, stage: str) -> tuple[Placement, str]:
        return reduce_placement(placement, (stage, 2), skeleton, recipe, windows, 0, "cpu")

    smaller, words = reduced(Placement(4), "calibrate")
    assert smaller == Placement(2) and words == "2 instead of 4 windows a forward pass"
    for stage in ("hessian", "factor"):
        assert reduced(Placement(4), stage)[0].replay, "smaller batches do not help the algebra"
    last = Placement(1, replay=True, host_streams=True, disk_streams=True, in_place=True)
    with pytest.raises(Interrupted, match=r"no smaller way is left: a block needs about .* \(model\.layers\.0\)"):
        reduced(last, "factor")

"""What a run counts: seconds and operations of a layer's stages, and what a block needed beside what was done."""

from pathlib import Path

import pytest
import tiny_models
import torch

from leangrid.machine import flops
from leangrid.machine.stopwatch import Clock
from leangrid.models.skeleton import Skeleton
from leangrid.recipe import Recipe
from leangrid.run.accounting import Accounting, LayerCosts
from leangrid.storage.source import open_source


def test_stages_of_a_layer_add_up_and_parts_of_it_are_added() -> None:
    whole, part = LayerCosts(torch.device("cpu")), LayerCosts(torch.device("cpu"))
    for costs in (whole, part, part):
        with costs.stage("grid"):
            pass
    assert whole.seconds["grid"] > 0 and part.seconds["grid"] > 0 and whole.seconds["solve"] == 0
    before, added = whole.seconds["grid"], part.seconds["grid"]
    whole.flops["solve"], part.flops["solve"] = 3.0, 4.0
    whole.add(part)
    assert whole.seconds["grid"] == pytest.approx(before + added) and whole.flops["solve"] == 7.0


def test_refinement_counts_as_solving_and_baselines_as_nothing_that_was_needed(tmp_path: Path) -> None:
    skeleton = Skeleton(open_source(tiny_models.save("llama2", tmp_path)))
    recipe = Recipe(scheme="NU3", refine=2).resolved()
    clock = Clock()
    accounting = Accounting(clock, skeleton, recipe, tokens=64)
    costs = LayerCosts(torch.device("cpu"))
    costs.seconds |= {"solve": 1.0, "refine": 2.0, "baseline": 4.0, "grid": 8.0}
    costs.flops |= {"solve": 10.0, "refine": 20.0, "baseline": 40.0}
    accounting.count_layer((6, 24), costs)
    assert clock.seconds["solve"] == 3.0 and clock.seconds["baseline"] == 4.0 and clock.seconds["grid"] == 8.0
    report = clock.flops.report()
    assert report["done"]["solve"] == 30.0 and report["done"]["baseline"] == 40.0
    assert report["needed"]["solve"] == flops.sweep(6, 24) + flops.refine(6, 24, 2)
    assert "baseline" not in report["needed"]

"""Groups of linears by their shapes, and what a plan makes of experts and of block tuning."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from live_bytes import LiveBytes

from leangrid.machine.memory import without_garbage_collection
from leangrid.models.experts import Experts
from leangrid.planning.cost import Rates, estimate_seconds
from leangrid.planning.demand import Demand
from leangrid.planning.footprint import sum_footprint
from leangrid.planning.groups import groups_of
from leangrid.planning.placement import Placement
from leangrid.planning.resolve import open_checkpoint
from leangrid.planning.sizes import compute_sizes
from leangrid.recipe import Recipe
from leangrid.run.quantize import quantize

Tiny = Callable[..., Path]


def test_a_stage_of_experts_is_one_group_with_a_hessian_an_expert(tiny: Tiny) -> None:
    _, skeleton, _ = open_checkpoint(tiny("qwen3_moe"), Recipe(scheme="NU4"))
    groups = groups_of(skeleton, 0)
    attention, (first, second) = groups[:-2], groups[-2:]
    assert [group.experts for group in attention] == [1] * len(attention)
    assert (first.experts, first.copies, second.experts, second.copies) == (4, 2, 4, 2)
    assert (first.cols, first.rows, first.made, first.read) == (64, 4 * 2 * 32, 2 * 2 * 32, 2 * 64)
    assert (second.cols, second.rows, second.made, second.read) == (32, 4 * 64, 2 * 64, 2 * 32)
    names = [skeleton.linear_name(0, name) for name in skeleton.groups(0)[-1]]
    assert sum(skeleton.shape(name)[0] for name in names) == second.rows


def test_experts_factors_are_shared_over_ranks_and_those_of_attention_are_not(tiny: Tiny) -> None:
    def factor(name: str, ranks: int) -> float:
        _, skeleton, recipe = open_checkpoint(tiny(name), Recipe(scheme="NU4", correct=0.0))
        layers = compute_sizes(skeleton, recipe).layers
        rates = Rates(1e6, 1e6, 1e6, 1.0, ranks=ranks)  # slow, since figures are rounded
        return estimate_seconds(skeleton, recipe, layers, Placement(1), rates)["factor"]

    assert factor("llama2", 4) == factor("llama2", 1)
    assert factor("qwen3_moe", 4) < 0.8 * factor("qwen3_moe", 1)


def test_experts_linears_exist_while_their_block_is_open(tiny: Tiny) -> None:
    _, skeleton, _ = open_checkpoint(tiny("qwen3_moe"), Recipe(scheme="NU4"))

    def made() -> list[int]:
        return [len(m._modules) for m in skeleton.model.modules() if isinstance(m, Experts)]

    closed = made()
    with skeleton.load_block(0, "cpu") as block:
        opened = made()
        inside = next(m for m in block.modules() if isinstance(m, Experts))
        assert all(not p.is_meta for p in inside.parameters())
    assert [after - before for before, after in zip(closed, opened, strict=True)] == [4, 0]
    assert made() == closed


def test_garbage_is_collected_again_afterwards() -> None:
    import gc

    was = gc.isenabled()
    with pytest.raises(ValueError, match="in between"), without_garbage_collection():
        assert not gc.isenabled()
        raise ValueError("in between")
    assert gc.isenabled() == was


def _planned_seconds(source: Path, replay: bool = False, **fields: Any) -> dict[str, float]:
    _, skeleton, recipe = open_checkpoint(source, Recipe(scheme="NU4", samples=16, **fields))
    layers = compute_sizes(skeleton, recipe).layers
    return estimate_seconds(skeleton, recipe, layers, Placement(1, replay=replay), Rates(1e6, 1e6, 1e6, 1.0))


def test_a_plan_counts_the_time_of_tuning_by_its_passes(tiny: Tiny) -> None:
    none, two, four = (_planned_seconds(tiny("llama2"), tune=passes) for passes in (0, 2, 4))
    assert "tune" not in none
    assert four["tune"] == pytest.approx(2 * two["tune"], rel=1e-3)
    forward = none["calibrate"] / 2  # two streams, 16 windows
    assert two["tune"] == pytest.approx(2 * 14 / 16 * 3 * forward, rel=0.02)


def test_a_plan_counts_the_time_of_finishing_by_its_passes(tiny: Tiny) -> None:
    none, two, four = (_planned_seconds(tiny("llama2"), finish=passes) for passes in (0, 2, 4))
    assert "finish" not in none
    assert four["finish"] == pytest.approx(2 * two["finish"], rel=1e-3)
    head = 2 * 16 * Recipe().length * tiny_models.VOCAB * tiny_models.HIDDEN / (0.7 * 1e6)
    blocks = none["calibrate"] / 2
    assert two["finish"] == pytest.approx(2 * 14 / 16 * 4 * (blocks + head), rel=0.02)
    replayed = _planned_seconds(tiny("llama2"), replay=True, finish=2)
    assert replayed["finish"] == pytest.approx(two["finish"] + 2 * 14 / 16 * blocks, rel=0.02)


def test_a_plan_counts_the_time_of_drawing_by_its_draws(tiny: Tiny) -> None:
    none, one, four = (_planned_seconds(tiny("llama2"), tune=2, guide=draws)["tune"] for draws in (0, 1, 4))
    assert four - one == pytest.approx(3 / 2 * (one - none), rel=1e-3)


@pytest.mark.fault("R3")
def test_the_memory_of_drawing_is_that_of_a_run(tmp_path: Path) -> None:
    source = tiny_models.synthetic(tmp_path / "source", blocks=8, hidden=64)
    recipe = Recipe(scheme="RTN4", tune=1, guide=4)
    with LiveBytes() as alive:
        quantize(source, tmp_path / "out", recipe, windows=tiny_models.tokens(4, 512), placement=Placement(1))
    _, skeleton, settled = open_checkpoint(source, recipe)
    planned = sum_footprint(Demand.of(skeleton, settled, 4, 512, "cpu"), Placement(1))
    assert planned.peak_phase == "draw"
    assert planned.peak == pytest.approx(alive.peak, rel=0.2), planned.phases["draw"]


@pytest.mark.fault("R3")
@pytest.mark.parametrize(
    ("phase", "blocks", "dtype", "replay"),
    [
        ("tune", 2, torch.float32, False),
        ("finish", 4, torch.float32, False),
        pytest.param("finish", 4, torch.bfloat16, False, marks=pytest.mark.slow),
        pytest.param("finish", 8, torch.float32, True, marks=pytest.mark.slow),
        pytest.param("finish", 8, torch.bfloat16, True, marks=pytest.mark.slow),
    ],
)
def test_the_memory_of_tuning_is_that_of_a_run(
    phase: str, blocks: int, dtype: torch.dtype, replay: bool, tmp_path: Path
) -> None:
    source = tiny_models.synthetic(tmp_path / "source", blocks=blocks, hidden=256, dtype=dtype)
    recipe = Recipe.model_validate({"scheme": "W4A16_G64", phase: 1})
    with LiveBytes() as alive:
        placement = Placement(1, replay=replay)
        quantize(source, tmp_path / "out", recipe, windows=tiny_models.tokens(4, 64), placement=placement)
    _, skeleton, settled = open_checkpoint(source, recipe)
    planned = sum_footprint(Demand.of(skeleton, settled, 4, 64, "cpu"), placement)
    assert planned.peak_phase == phase
    assert planned.peak == pytest.approx(alive.peak, rel=0.2), planned.phases[phase]

"""The plan's sums against the tensors that are alive in real runs, and the shapes that must fit known cards."""

from dataclasses import replace
from pathlib import Path

import pytest
import tiny_models
import torch
from live_bytes import LiveBytes

from leangrid.planning.demand import Demand
from leangrid.planning.footprint import TOKENS_A_BATCH, choose_placement, sum_footprint
from leangrid.planning.groups import Group
from leangrid.planning.placement import Placement
from leangrid.planning.resolve import open_checkpoint
from leangrid.recipe import Recipe
from leangrid.run.quantize import quantize
from leangrid.schemes import Scheme

GIB = 2**30
REPLAY = Placement(2, replay=True)


def llama(hidden: int, intermediate: int, kv: int) -> Demand:
    """A Llama block in bfloat16 on a CUDA device, 128 windows of 2048 tokens, two streams."""
    groups = (
        Group(hidden, hidden + 2 * kv, hidden),
        Group(hidden, hidden, hidden),
        Group(hidden, 2 * intermediate, intermediate),
    )
    down = Group(intermediate, hidden, hidden)
    packed = sum(g.rows * g.cols for g in (*groups, down)) * 5 // 8
    return Demand((*groups, down), hidden, 128256, 128, 2048, 2, 2, 2, packed, True, (Scheme.parse("W4A16"),))


LLAMA_8B, LLAMA_70B, LLAMA_405B = llama(4096, 14336, 1024), llama(8192, 28672, 1024), llama(16384, 53248, 1024)


@pytest.mark.parametrize("placement", [Placement(16), pytest.param(replace(REPLAY, windows=4), marks=pytest.mark.slow)])
def test_the_sum_with_rounded_products(placement: Placement, tmp_path: Path) -> None:
    """Linears of a bfloat16 model give out bfloat16 where the CPU multiplies it."""
    source = tiny_models.synthetic(tmp_path / "source", blocks=2, hidden=128, dtype=torch.bfloat16)
    recipe = Recipe(scheme="W4A16_G64", products="bfloat16")
    with LiveBytes() as alive:
        quantize(source, tmp_path / "out", recipe, windows=tiny_models.tokens(32, 256), placement=placement)
    _, skeleton, settled = open_checkpoint(source, recipe)
    planned = sum_footprint(Demand.of(skeleton, settled, 32, 256, "cpu"), placement)
    assert planned.peak == pytest.approx(alive.peak, rel=0.15), planned.phases[planned.peak_phase]


@pytest.mark.fault("R3")
@pytest.mark.parametrize(
    ("hidden", "samples", "length", "scheme", "placement"),
    [
        (128, 32, 256, "W4A16_G64", Placement(16)),  # tokens decide
        pytest.param(128, 32, 256, "GPTQ4", Placement(16), marks=pytest.mark.slow),
        pytest.param(128, 32, 256, "NU4", replace(REPLAY, windows=4), marks=pytest.mark.slow),
        pytest.param(384, 4, 64, "W4A16_G64", Placement(4), marks=pytest.mark.slow),  # matrices decide
        pytest.param(384, 4, 64, "GPTQ4", REPLAY, marks=pytest.mark.slow),
        pytest.param(128, 32, 256, "W4A16_G64", replace(REPLAY, windows=4, disk_streams=True), marks=pytest.mark.slow),
        (384, 4, 64, "NU4", replace(REPLAY, in_place=True)),
        pytest.param(384, 4, 64, "W3A16_G32", replace(REPLAY, in_place=True), marks=pytest.mark.slow),
        (256, 8, 256, "NU3", Placement(4)),  # both
    ],
)
def test_the_sum_is_the_peak_of_live_tensors(
    hidden: int, samples: int, length: int, scheme: str, placement: Placement, tmp_path: Path
) -> None:
    source = tiny_models.synthetic(tmp_path / "source", blocks=2, hidden=hidden)
    recipe = Recipe(scheme=scheme, search="lloyd")
    with LiveBytes() as alive:
        quantize(source, tmp_path / "out", recipe, windows=tiny_models.tokens(samples, length), placement=placement)
    _, skeleton, settled = open_checkpoint(source, recipe)
    planned = sum_footprint(Demand.of(skeleton, settled, samples, length, "cpu"), placement)
    assert planned.peak == pytest.approx(alive.peak, rel=0.15), planned.phases[planned.peak_phase]


@pytest.mark.parametrize(
    "placement", [Placement(4), pytest.param(replace(REPLAY, in_place=True), marks=pytest.mark.slow)]
)
def test_the_noise_of_the_correction_is_counted(placement: Placement, tmp_path: Path) -> None:
    """Where matrices decide, a share that is measured takes one matrix more, or in place none at the peak."""
    source = tiny_models.synthetic(tmp_path / "source", blocks=2, hidden=384)
    planned = {}
    for correct in ("auto", 0.5):
        recipe = Recipe.model_validate({"scheme": "W4A16_G64", "correct": correct})
        _, skeleton, settled = open_checkpoint(source, recipe)
        planned[correct] = sum_footprint(Demand.of(skeleton, settled, 4, 64, "cpu"), placement)
    recipe = Recipe(scheme="W4A16_G64", correct="auto")
    with LiveBytes() as alive:
        quantize(source, tmp_path / "out", recipe, windows=tiny_models.tokens(4, 64), placement=placement)
    assert planned["auto"].peak == pytest.approx(alive.peak, rel=0.15), planned["auto"].phases
    sums = [planned[correct].phases["hessian 3"]["H and G"] for correct in ("auto", 0.5)]
    assert sums[0] == 1.5 * sums[1]
    assert (planned["auto"].peak > planned[0.5].peak) or placement.in_place


def _smallest(work: Demand) -> tuple[Placement, int]:
    peaks = ((option, sum_footprint(work, option).peak) for option in Placement(8).candidates())
    return min(peaks, key=lambda pair: pair[1])


def test_an_8b_block_fits_24_gib_and_a_405b_block_48() -> None:
    first = next(o for o in Placement(8).candidates() if sum_footprint(LLAMA_8B, o).peak < 0.94 * 24 * GIB)
    assert first.replay and not first.in_place and not first.host_streams, "replaying is enough"
    assert _smallest(LLAMA_8B)[1] < 8 * GIB
    assert _smallest(LLAMA_70B)[1] < 0.94 * 24 * GIB
    placement, peak = _smallest(LLAMA_405B)
    assert placement.in_place and peak < 0.94 * 48 * GIB
    square = 4 * 53248**2
    assert peak < 4.1 * square, "three matrices and what else a block needs"


def test_every_step_down_needs_no_more() -> None:
    for work in (LLAMA_8B, LLAMA_70B, LLAMA_405B):
        peaks = [sum_footprint(work, option).peak for option in Placement(8).candidates()]
        assert peaks == sorted(peaks, reverse=True)
    whole = sum_footprint(LLAMA_8B, Placement(1, replay=True, in_place=True, host_streams=True))
    algebra_away = sum_footprint(
        LLAMA_8B, Placement(1, replay=True, in_place=True, host_streams=True, host_groups=(0, 1, 2, 3))
    )
    away = sum_footprint(LLAMA_8B, Placement(1, replay=True, host_streams=True, host_block=True))
    assert whole.peak > algebra_away.peak >= away.peak and algebra_away.host_peak > whole.host_peak


def test_the_first_that_fits_is_chosen(tmp_path: Path) -> None:
    _, skeleton, settled = open_checkpoint(tiny_models.save("llama2", tmp_path), Recipe(scheme="NU4"))
    rich, _ = choose_placement(skeleton, settled, 64, 128, "cpu", budget=GIB)
    assert rich == Placement(TOKENS_A_BATCH["cpu"] // 128)
    paused = sum_footprint(Demand.of(skeleton, settled, 64, 128, "cpu"), rich).peak
    tight, needed = choose_placement(skeleton, settled, 64, 128, "cpu", budget=paused - 1)
    assert tight.replay and needed.peak < paused
    last = Placement(1, replay=True, host_streams=True, disk_streams=True, in_place=True)
    assert choose_placement(skeleton, settled, 64, 128, "cpu", budget=0)[0] == last


def test_states_go_to_disk_where_neither_device_nor_host_holds_them(tmp_path: Path) -> None:
    _, skeleton, settled = open_checkpoint(tiny_models.save("llama2", tmp_path), Recipe(scheme="NU4"))
    states = Demand.of(skeleton, settled, 512, 512, "cuda").states
    device = states + (1 << 28)  # holds the states; not the activations of a paused walk beside them
    roomy, _ = choose_placement(skeleton, settled, 512, 512, "cuda", budget=device, host_budget=4 * states)
    assert roomy.replay and not roomy.host_streams
    small = 1 << 28
    beside, held = choose_placement(skeleton, settled, 512, 512, "cuda", budget=small, host_budget=4 * states)
    assert beside.host_streams and not beside.disk_streams and held.host["streams in and out"] == 2 * states
    away, held = choose_placement(skeleton, settled, 512, 512, "cuda", budget=small, host_budget=states)
    assert away.disk_streams and held.host_peak < states and held.peak <= small
    alone, held = choose_placement(skeleton, settled, 512, 512, "cpu", budget=small)
    assert alone.disk_streams and held.peak <= small


def test_parts_have_names_and_sizes() -> None:
    planned = sum_footprint(LLAMA_8B, Placement(8))
    parts = planned.phases["hessian 3"]
    assert parts["weights"] == 2 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    assert parts["streams"] == 2 * 2 * 128 * 2048 * 4096 and parts["H and G"] == 2 * 4 * 14336**2
    assert (
        planned.peak
        == max(sum(p.values()) for p in planned.phases.values())
        == sum(planned.phases[planned.peak_phase].values())
    )

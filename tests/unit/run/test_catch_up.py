"""Runs of models in which more flows than hidden states: stopped and gone on with, with less memory, to the same
bytes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
import torch

import leangrid
from leangrid.planning.placement import Placement
from leangrid.progress import Event
from leangrid.recipe import Recipe
from leangrid.run.quantize import quantize

Tiny = Callable[..., Path]
WINDOWS = tiny_models.tokens(6, 32)
RECIPE = Recipe(scheme="W8A16")


def _stop_after(block: int) -> Callable[[Event], None]:
    def progress(event: Event) -> None:
        if event.stage == "block" and event.block == block:
            raise KeyboardInterrupt

    return progress


def _bytes(directory: Path) -> list[bytes]:
    return [(directory / name).read_bytes() for name in ("model.safetensors", "config.json")]


@pytest.fixture(scope="module")
def whole(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def result(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "whole"
            quantize(tiny(name), made[name], RECIPE, windows=WINDOWS)
        return made[name]

    return result


@pytest.mark.fault("C4")
@pytest.mark.parametrize("block", [0, 2])
def test_a_stopped_run_computes_the_states_again_and_ends_in_the_same_bytes(
    block: int, tiny: Tiny, whole: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        quantize(tiny("gemma3n"), tmp_path / "out", RECIPE, windows=WINDOWS, progress=_stop_after(block))
    assert (tmp_path / "out.partial").is_dir()
    events: list[Event] = []
    quantize(tiny("gemma3n"), tmp_path / "out", RECIPE, windows=WINDOWS, progress=events.append)
    assert [e.block for e in events if e.stage == "block"] == list(range(block + 1, 4))
    assert any("computed once more" in e.message for e in events if e.stage == "notice")
    assert _bytes(tmp_path / "out") == _bytes(whole("gemma3n"))


@pytest.mark.parametrize("name", tiny_models.FLOWING)
def test_replayed_groups_give_the_same_bytes(
    name: str, tiny: Tiny, whole: Callable[[str], Path], tmp_path: Path
) -> None:
    quantize(tiny(name), tmp_path / "out", RECIPE, windows=WINDOWS, placement=Placement(len(WINDOWS), replay=True))
    assert _bytes(tmp_path / "out") == _bytes(whole(name))


@torch.no_grad()
@pytest.mark.parametrize("name", tiny_models.FLOWING)
def test_the_result_is_near_the_original(name: str, whole: Callable[[str], Path]) -> None:
    model, _ = leangrid.load(whole(name))
    ours, theirs = (each.base_model(WINDOWS[:2]).last_hidden_state for each in (model, tiny_models.build(name)))
    assert 0 < float((ours - theirs).norm() / theirs.norm()) < 0.03

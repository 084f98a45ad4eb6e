"""Runs that compute states once more: of models in which more flows than hidden states, and where states were not saved
or are damaged; stopped and gone on with, with less memory, to the same bytes."""

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
from leangrid.storage.state_schedule import StateSchedule

Tiny = Callable[..., Path]
WINDOWS = tiny_models.tokens(6, 32)
RECIPE = Recipe(scheme="W8A16")


def _recipe_of(name: str) -> Recipe:
    """compressed-tensors takes no Conv1D."""
    return Recipe(scheme="NU4") if name == "gpt2" else RECIPE


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
            quantize(tiny(name), made[name], _recipe_of(name), windows=WINDOWS)
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


def _resume(source: Path, out: Path, recipe: Recipe = RECIPE, placement: Placement | None = None) -> list[Event]:
    events: list[Event] = []
    quantize(source, out, recipe, windows=WINDOWS, progress=events.append, placement=placement)
    return events


def _blocks(events: list[Event]) -> list[int]:
    return [event.block for event in events if event.stage == "block"]


def _said(events: list[Event], words: str) -> bool:
    return any(words in event.message for event in events if event.stage == "notice")


@pytest.mark.fault("C4")
@pytest.mark.parametrize("name", ["bert", "gpt2", "gpt_oss", "qwen3_moe", "gemma3"])
def test_states_that_were_never_saved_are_computed_to_the_same_bytes(
    name: str, tiny: Tiny, whole: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StateSchedule, "is_due", lambda *_: False)
    with pytest.raises(KeyboardInterrupt):
        quantize(tiny(name), tmp_path / "out", _recipe_of(name), windows=WINDOWS, progress=_stop_after(0))
    assert not list((tmp_path / "out.partial" / "state").iterdir())
    events = _resume(tiny(name), tmp_path / "out", _recipe_of(name))
    assert _blocks(events) == [1] and _said(events, "computed once more, from block 1 on")
    assert _bytes(tmp_path / "out") == _bytes(whole(name))


@pytest.mark.fault("C4")
@pytest.mark.parametrize(
    ("recipe", "placement"),
    [
        (Recipe(scheme="W3A16", tune=2), None),
        (Recipe(scheme="NU3", correct="auto"), Placement(2)),
        (Recipe(scheme="NU3"), Placement(4, replay=True)),
        (Recipe(scheme="NU3"), Placement(4, replay=True, host_streams=True, disk_streams=True)),
    ],
)
def test_they_are_computed_from_the_last_that_were_saved(
    recipe: Recipe, placement: Placement | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four blocks three are finished, and only the states between the first two were saved."""
    source = tiny_models.synthetic(tmp_path / "source", 4)
    quantize(source, tmp_path / "whole", recipe, windows=WINDOWS, placement=placement)
    due = iter([True, False, False, False])
    monkeypatch.setattr(StateSchedule, "is_due", lambda *_: next(due))
    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "out", recipe, windows=WINDOWS, progress=_stop_after(2), placement=placement)
    assert {path.name for path in (tmp_path / "out.partial" / "state").glob("*.json")} == {"0001.json"}
    events = _resume(source, tmp_path / "out", recipe, placement)
    assert _blocks(events) == [3] and _said(events, "computed once more, from block 2 on")
    assert _bytes(tmp_path / "out") == _bytes(tmp_path / "whole")


@pytest.mark.fault("C11")
def test_damaged_states_cost_no_finished_block(tiny: Tiny, whole: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        quantize(tiny("bert"), tmp_path / "out", RECIPE, windows=WINDOWS, progress=_stop_after(0))
    states = tmp_path / "out.partial" / "state" / "0001.safetensors"
    data = bytearray(states.read_bytes())
    data[-1] ^= 1
    states.write_bytes(data)
    events = _resume(tiny("bert"), tmp_path / "out")
    assert _blocks(events) == [1] and _said(events, "computed once more")
    assert _bytes(tmp_path / "out") == _bytes(whole("bert"))

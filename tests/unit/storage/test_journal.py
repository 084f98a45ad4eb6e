"""storage/journal.py: what it stores, in which order, and what it removes."""

from pathlib import Path

import pytest
import torch

from leangrid.errors import OutputError, ResumeError
from leangrid.storage import safetensors
from leangrid.storage.journal import Journal, first_difference, partial_of

RUN = {"recipe": {"scheme": "NU4", "p": 4.0}, "source": "abc", "windows": "def", "version": "1"}


def opened(tmp_path: Path, **options: bool) -> Journal:
    return Journal.for_output(tmp_path / "out").start_or_resume(RUN, **options)


def test_blocks_come_back_as_they_were(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.randn(3, 4).bfloat16(), "b.codes": torch.arange(5, dtype=torch.int32)}
    with opened(tmp_path) as journal:
        assert journal.count_committed() == 0 and journal.is_fresh
        journal.commit_block(0, tensors, {"losses": [0.5, 1e-9], "device": "cpu"})
        with pytest.raises(ValueError, match="block 2 cannot be committed before block 1"):
            journal.commit_block(2, tensors, {})
    with opened(tmp_path) as journal:
        assert journal.count_committed() == 1 and not journal.is_fresh
        read = safetensors.load(journal.partial / "blocks" / "0000.safetensors")
        assert journal.read_block_info(0) == {"losses": [0.5, 1e-9], "device": "cpu"}
        assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
        assert set(journal.locate_block_tensors(0)) == set(tensors)


def test_committing_again_drops_what_came_after(tmp_path: Path) -> None:
    with opened(tmp_path) as journal:
        for index in range(3):
            journal.commit_block(index, {"x": torch.full((2,), float(index))}, {})
        journal.commit_block(1, {"x": torch.full((2,), 9.0)}, {})
        assert journal.count_committed() == 2
        changed = safetensors.load(journal.partial / "blocks" / "0001.safetensors")
        assert changed["x"].tolist() == [9.0, 9.0]
    with opened(tmp_path) as journal:
        assert journal.count_committed() == 2


@pytest.mark.parametrize("state_first", [False, True])
def test_resume_point_whichever_comes_first(tmp_path: Path, state_first: bool) -> None:
    """A stop between a block and its state, in either order, costs at most that block."""
    with opened(tmp_path) as journal:
        for index in range(3):
            steps = [
                lambda i=index: journal.commit_block(i, {"x": torch.ones(1)}, {}),
                lambda i=index: journal.save_state(i + 1, {"h": torch.ones(i + 1)}),
            ]
            for step in reversed(steps) if state_first else steps:
                step()
        (journal.save_state if state_first else journal.commit_block)(
            *((4, {"h": torch.ones(4)}) if state_first else (3, {}, {}))
        )
    with opened(tmp_path) as journal:
        assert journal.find_resume_point() == journal.count_committed() == 3
        state = journal.load_state(3)
        assert state is not None and state["h"].numel() == 3


def test_only_needed_states_are_kept(tmp_path: Path) -> None:
    for place in (None, tmp_path / "elsewhere"):
        journal = Journal(tmp_path / f"{'near' if place is None else 'far'}.partial", place).start_or_resume(RUN)
        states = journal.partial / "state" if place is None else place / "far.partial.state"
        for index in range(4):
            journal.commit_block(index, {}, {})
            journal.save_state(index + 1, {"h": torch.ones(2)})
        assert sorted(p.name for p in states.iterdir()) == ["0004.json", "0004.safetensors"]
        assert journal.load_state(3) is None
        journal.discard()
        assert not states.exists() and not journal.partial.exists()


def test_without_any_state_everything_is_made_again(tmp_path: Path) -> None:
    with opened(tmp_path) as journal:
        journal.commit_block(0, {"x": torch.ones(1)}, {})
    with opened(tmp_path) as journal:
        assert journal.find_resume_point() == 0
        assert any("going on from block 1" in notice for notice in journal.notices)


def test_where_states_are_computed_again_no_block_is_made_again(tmp_path: Path) -> None:
    with opened(tmp_path) as journal:
        for index in range(3):
            journal.commit_block(index, {"x": torch.ones(1)}, {})
            if not index:
                journal.save_state(1, {"h": torch.ones(1)})
    journal = Journal(tmp_path / "out.partial")
    journal.computes_states = True
    with journal.start_or_resume(RUN):
        assert journal.find_resume_point() == 3 and journal.find_state() == 1
        assert journal.notices == []


def test_named_artefacts(tmp_path: Path) -> None:
    with opened(tmp_path) as journal:
        assert journal.load_artifact("windows") is None
        journal.save_artifact("windows", {"tokens": torch.arange(6).reshape(2, 3)})
        for name in ("../evil", "A", "", "a/b", "x.y"):
            with pytest.raises(ValueError, match="plain name"):
                journal.save_artifact(name, {})
    with opened(tmp_path) as journal:
        windows = journal.load_artifact("windows")
        assert windows is not None and windows["tokens"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_nothing_begun_leaves_nothing(tmp_path: Path) -> None:
    partial = partial_of(tmp_path / "out")
    partial.write_text("a file")
    with pytest.raises(OutputError, match="not a directory"):
        opened(tmp_path)
    partial.unlink()
    journal = opened(tmp_path)
    assert (partial / "LOCK").exists() and (partial / "identity.json").exists()
    journal.discard()
    journal.close()
    assert list(tmp_path.iterdir()) == []


def test_restart_forgets_and_an_identity_that_is_lost_is_not_guessed(tmp_path: Path) -> None:
    with opened(tmp_path) as journal:
        journal.commit_block(0, {"x": torch.ones(1)}, {})
    (journal.partial / "identity.json").unlink()
    with pytest.raises(ResumeError, match="without its identity"):
        opened(tmp_path)
    with opened(tmp_path, restart=True) as journal:
        assert journal.count_committed() == 0
    (journal.partial / "identity.json").write_text("{")
    with pytest.raises(ResumeError, match="cannot be read"):
        opened(tmp_path)


def test_restart_gives_back_a_result_that_was_moved_away(tmp_path: Path) -> None:
    """A kill between the two renames of --overwrite, then --restart: the older result is not lost."""
    with opened(tmp_path) as journal:
        (journal.partial / "replaced").mkdir()
        (journal.partial / "replaced" / "older").write_text("older")
    opened(tmp_path, restart=True).close()
    assert (tmp_path / "out" / "older").read_text() == "older"


def test_first_difference_names_the_field() -> None:
    assert first_difference({"a": {"b": 1, "c": [1]}}, {"a": {"b": 1, "c": [1]}}) is None
    assert first_difference({"a": {"b": 1, "c": [1]}}, {"a": {"b": 1, "c": [2]}}) == ("a.c", [1], [2])
    assert first_difference({"a": None}, {}) == ("a", None, "absent")
    assert first_difference({"a": 1}, {"a": True}) == ("a", 1, True)
    assert first_difference({"a": {"x": 1}}, {"a": 3}) == ("a", {"x": 1}, 3)


def test_what_is_finished_takes_the_places_of_tensors_until_a_block_is_made_again(tmp_path: Path) -> None:
    def stored(journal: Journal, index: int) -> dict[str, list[float]]:
        infos = journal.locate_block_tensors(index)
        return {name: tensor.tolist() for name, tensor in safetensors.read_named(infos, infos).items()}

    with opened(tmp_path) as journal:
        for index in range(2):
            journal.commit_block(index, {f"{index}.codes": torch.ones(1), f"{index}.scale": torch.ones(1)}, {})
        assert journal.read_finished_info() is None
        journal.commit_finished({"1.scale": torch.full((1,), 2.0)}, {"passes": 3})
        assert stored(journal, 0) == {"0.codes": [1.0], "0.scale": [1.0]}
        assert stored(journal, 1) == {"1.codes": [1.0], "1.scale": [2.0]}
    with opened(tmp_path) as journal:
        assert journal.find_resume_point() == 2  # no states are missed: no block reads any
        assert journal.read_finished_info() == {"passes": 3} and stored(journal, 1)["1.scale"] == [2.0]
        path = journal.partial / "named" / "finished.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    with opened(tmp_path) as journal:
        assert journal.read_finished_info() is None and any("finished" in notice for notice in journal.notices)
        assert stored(journal, 1)["1.scale"] == [1.0]
        journal.commit_finished({"1.scale": torch.full((1,), 2.0)}, {})
        journal.commit_block(1, {"1.codes": torch.zeros(1), "1.scale": torch.zeros(1)}, {})
        assert journal.read_finished_info() is None and stored(journal, 1)["1.scale"] == [0.0]

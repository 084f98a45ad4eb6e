"""An OUT that exists and is empty: a directory, a mount point, a directory in one that cannot be written to."""

import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import forked
import pytest
from tiny_run import digest, run, write_source

from leangrid.errors import OutputError
from leangrid.storage import disk, files
from leangrid.storage.journal import Journal, output_of, partial_of
from leangrid.storage.manifest import amend_result, list_differences
from leangrid.storage.writer import check_output_path, make_staging_directory, write_staged_result

# Before each of the moves, after the last, and as the journal goes.
KILLS = [f"publish.before_rename:{count}" for count in (1, 2, 3, 6, 7, 8, 9, 10, 12)] + [
    "publish.after_sync:7",
    "remove.before_rmdir:1",
]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    source = write_source(tmp_path / "source")
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text("{}")
    return source


@pytest.fixture
def volume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh ext4 volume, as a container mounts it: no rename can replace it."""
    out = tmp_path / "volume"
    (out / "lost+found").mkdir(parents=True)
    monkeypatch.setattr(disk, "is_mount", lambda path: path.name == "volume")
    replace = os.replace

    def busy(source: Path, target: Path) -> None:
        if out in (Path(source), Path(target)):
            raise OSError(16, "Device or resource busy")
        replace(source, target)

    monkeypatch.setattr(os, "replace", busy)
    return out


@pytest.mark.fault("C7")
def test_an_empty_directory_is_taken(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "expected")
    (tmp_path / "out").mkdir()
    run(source, tmp_path / "out")
    assert list_differences(tmp_path / "out") == [] and digest(tmp_path / "out") == digest(tmp_path / "expected")
    assert not partial_of(tmp_path / "out").exists()


@pytest.mark.fault("C7")
@pytest.mark.parametrize("name", ["thesis.txt", ".hidden", ".partial"])
def test_a_directory_with_anything_in_it_is_not_ours_to_fill(source: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        check_output_path(tmp_path / "out", source)
    assert (tmp_path / "out" / name).read_text() == "mine"


def test_a_directory_that_was_filled_during_the_run_is_left_alone(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with Journal.for_output(out).start_or_resume({"x": 1}) as journal:
        make_staging_directory(journal)
        (out / "thesis.txt").write_text("mine")
        with pytest.raises(OutputError, match="appeared during the run") as told:
            write_staged_result(journal, out, {"a.txt": "a"}, {})
    assert told.value.exit_code == 3 and (out / "thesis.txt").read_text() == "mine"


@pytest.mark.fault("C10")
def test_a_mount_point_is_filled(source: Path, tmp_path: Path, volume: Path) -> None:
    run(source, tmp_path / "expected")
    run(source, volume)
    assert list_differences(volume) == [] and digest(volume) == digest(tmp_path / "expected")
    assert {path.name for path in volume.iterdir()} == {path.name for path in (tmp_path / "expected").iterdir()} | {
        "lost+found"
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "source", "volume"]
    with pytest.raises(OutputError, match="--overwrite"):
        check_output_path(volume, source)


@pytest.mark.fault("C10")
@pytest.mark.parametrize("older", [False, True])
def test_a_kill_while_a_mount_point_is_filled_is_finished_by_the_same_command(
    source: Path, tmp_path: Path, volume: Path, older: bool
) -> None:
    run(source, tmp_path / "expected")
    shutil.copytree(tmp_path / "expected", tmp_path / "older")
    amend_result(tmp_path / "older", {"older.txt": b"an older result"})
    expected, again = digest(tmp_path / "expected"), partial(run, source, volume, overwrite=older)
    for kill in KILLS:
        files.remove_tree(volume)
        shutil.copytree(tmp_path / "older", volume) if older else volume.mkdir()
        killed = forked.status_of(again, kill) == -9
        rest = [line for line in list_differences(volume) if not line.startswith(".partial: ")]
        assert not rest or not (volume / "manifest.json").exists(), f"{kill}: a manifest that is not kept: {rest}"
        assert killed or not older, kill
        if killed:
            again()
        assert digest(volume) == expected and list_differences(volume) == [], kill


@pytest.mark.fault("C10")
def test_a_failure_that_is_taken_back_brings_the_older_result_back(
    volume: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an export does, which keeps no journal. Whatever step fails, OUT is the older result or the newer one."""
    _publish(volume, "older")
    move, outcomes = files.move_into, []
    for failing in range(1, 9):
        passed = iter(range(1, 99))

        def fails(path: Path, directory: Path, passed: Iterator[int] = passed, failing: int = failing) -> None:
            if next(passed) == failing:
                raise OutputError("cannot move", path)
            move(path, directory)

        monkeypatch.setattr(files, "move_into", fails)
        with pytest.raises(OutputError), Journal.for_output(volume).start_or_resume({"x": 1}) as journal:
            try:
                _publish(volume, "newer", journal)
            except OutputError:
                monkeypatch.setattr(files, "move_into", move)
                journal.discard()
                raise
        assert list_differences(volume) == []
        assert digest(volume).keys() == {"manifest.json", "a.txt", "older.txt", "b/older.txt"}
        outcomes.append((volume / "a.txt").read_text())
    assert outcomes == ["older"] * 8


def _publish(out: Path, text: str, journal: Journal | None = None) -> None:
    with journal or Journal.for_output(out).start_or_resume({"x": text}) as opened:
        files.make_dir(make_staging_directory(opened) / "b")
        for name in (f"{text}.txt", f"b/{text}.txt"):
            files.atomic_write(opened.partial / "publish" / name, text.encode())
        write_staged_result(opened, out, {"a.txt": text}, {}, overwrite=True)


def test_the_journal_of_a_mount_point_keeps_its_names(tmp_path: Path, volume: Path) -> None:
    assert partial_of(volume) == volume / ".partial" and output_of(volume / ".partial") == volume
    assert Journal.for_output(volume, tmp_path).states == tmp_path / "volume.partial.state"
    assert (
        partial_of(tmp_path / "out") == tmp_path / "out.partial"
        and output_of(tmp_path / "out.partial") == tmp_path / "out"
    )


def test_a_mount_is_recognised() -> None:
    assert disk.is_mount(Path("/proc")) and disk.is_mount(Path("/")) and not disk.is_mount(Path(__file__).parent)

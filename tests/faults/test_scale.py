"""Hidden states on disk and weights read ahead: the same bytes as in memory, through a kill and through a directory
that fills."""

import errno
import json
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from forked import status_of
from tiny_run import digest

from leangrid.errors import OutputError
from leangrid.planning import footprint
from leangrid.planning.placement import Placement
from leangrid.planning.resolve import open_checkpoint
from leangrid.planning.sizes import disk_bytes, state_bytes
from leangrid.recipe import Recipe
from leangrid.report.views import TIMED
from leangrid.run.quantize import quantize
from leangrid.run.states import StatePlaces
from leangrid.storage import disk, files
from leangrid.storage.source import Checkpoint

WINDOWS, RECIPE = tiny_models.tokens(6, 32), Recipe(scheme="NU4")
IN_MEMORY = Placement(2, replay=True, host_streams=True)
ON_DISK = Placement(2, replay=True, host_streams=True, disk_streams=True)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny_models.synthetic(tmp_path / "source", blocks=3)


def _bytes(out: Path) -> dict[str, str]:
    return {name: sha256 for name, sha256 in digest(out).items() if name not in TIMED}


def _run(source: Path, out: Path, placement: Placement | None = None, states: Path | None = None) -> dict[str, str]:
    quantize(source, out, RECIPE, windows=WINDOWS, placement=placement, state_dir=states)
    return _bytes(out)


def test_states_on_disk_give_the_same_bytes_and_are_recorded(source: Path, tmp_path: Path) -> None:
    states = tmp_path / "states"
    expected = _run(source, tmp_path / "expected", IN_MEMORY)
    assert _run(source, tmp_path / "out", ON_DISK, states) == expected
    assert not list(states.rglob("*.*")), "nothing stays in the state directory"


@pytest.mark.fault("C1")
def test_a_run_with_states_on_disk_is_killed_and_goes_on(source: Path, tmp_path: Path) -> None:
    expected, out, states = _run(source, tmp_path / "expected", IN_MEMORY), tmp_path / "out", tmp_path / "states"
    job = partial(_run, source, out, ON_DISK, states)
    assert status_of(job, "journal.after_state:2") == -9
    info = json.loads((tmp_path / "out.partial" / "blocks" / "0001.json").read_text())["info"]
    assert info["placement"]["disk_streams"] is True
    quantize(source, out, RECIPE, windows=WINDOWS, state_dir=states)  # keeps the placement of the last block
    assert _bytes(out) == expected and not list(states.rglob("*.*"))


class _Full:
    """Stands for ``os`` in storage/files.py: the n-th reservation or write below ``folder`` finds no space."""

    def __init__(self, folder: Path, number: int) -> None:
        self.folder, self.number, self.calls, self.inside = str(folder), number, 0, set[int]()

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def open(self, path: Any, *given: Any) -> int:
        descriptor = os.open(path, *given)
        (self.inside.add if str(path).startswith(self.folder) else self.inside.discard)(descriptor)
        return descriptor

    def write(self, descriptor: int, piece: Any) -> int:
        self._count(descriptor)
        return os.write(descriptor, piece)

    def posix_fallocate(self, descriptor: int, start: int, size: int) -> None:
        self._count(descriptor)
        os.posix_fallocate(descriptor, start, size)

    def _count(self, descriptor: int) -> None:
        self.calls += descriptor in self.inside
        if descriptor in self.inside and self.calls == self.number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.fault("C5")
@pytest.mark.parametrize(
    "number", [pytest.param(1, marks=pytest.mark.slow), 9, pytest.param(12, marks=pytest.mark.slow)]
)  # the embeddings, a batch that leaves a block, states that are written
def test_a_state_directory_that_fills_stops_the_run_which_goes_on(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    expected, states = _run(source, tmp_path / "expected", IN_MEMORY), tmp_path / "states"
    with monkeypatch.context() as patch:
        patch.setattr(files, "os", _Full(states, number))
        with pytest.raises(OutputError, match=r"No space left on device; it needs \d+ bytes, .* free") as caught:
            _run(source, tmp_path / "out", ON_DISK, states)
    assert caught.value.exit_code == 3 and str(states) in str(caught.value) and not (tmp_path / "out").exists()
    assert not list(states.rglob("*.tmp"))
    assert _run(source, tmp_path / "out", ON_DISK, states) == expected


def _disk(monkeypatch: pytest.MonkeyPatch, free: dict[Path, int]) -> None:
    """Let the disks of these folders have so many bytes free."""

    def usage(path: Path) -> Any:
        left = next(bytes_left for folder, bytes_left in free.items() if path.is_relative_to(folder))
        return shutil._ntuple_diskusage(left, 0, left)

    monkeypatch.setattr(disk.shutil, "disk_usage", usage)


def _asked(needed: int) -> int:
    """What require_space asks for: 5% more."""
    return int(needed * 1.05)


@pytest.mark.fault("C6")
def test_states_in_files_are_counted_before_work(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, skeleton, settled = open_checkpoint(source, RECIPE)
    held, mapped = (disk_bytes(skeleton, settled, WINDOWS.numel(), mapped) for mapped in (False, True))
    assert (
        mapped.states - held.states == 2 * state_bytes(skeleton, settled, WINDOWS.numel()) > 0
        and mapped.result == held.result
    )
    out, states = tmp_path / "out", tmp_path / "states"
    _disk(monkeypatch, {tmp_path: _asked(sum(held))})
    # Without memory the smallest placement is chosen, with states in mapped files.
    monkeypatch.setattr(footprint, "usable_device_bytes", lambda _device: 0)
    with pytest.raises(
        OutputError, match=rf"about {_asked(sum(mapped))} bytes needed, {_asked(sum(held))} bytes free"
    ) as caught:
        _run(source, out, states=states)
    assert caught.value.exit_code == 2 and not list(tmp_path.glob("out*")) and not list(states.iterdir())
    monkeypatch.setattr(footprint, "usable_device_bytes", lambda _device: 1 << 40)
    _run(source, out, states=states)


@pytest.mark.fault("C6")
def test_the_disk_of_the_states_is_looked_at_itself(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, skeleton, settled = open_checkpoint(source, RECIPE)
    needed, states = disk_bytes(skeleton, settled, WINDOWS.numel()), tmp_path / "states"
    monkeypatch.setattr(disk, "same_disk", lambda _one, _other: False)
    _disk(monkeypatch, {states: _asked(needed.states) - 1, tmp_path: _asked(needed.result)})
    with pytest.raises(OutputError, match=rf"about {_asked(needed.states)} bytes needed") as caught:
        _run(source, tmp_path / "out", states=states)
    assert str(states) in str(caught.value) and not list(tmp_path.glob("out*"))


@pytest.mark.fault("C6")
def test_a_resumed_run_is_not_asked_for_space_that_it_has_taken(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert status_of(partial(_run, source, out, IN_MEMORY), "journal.after_state:2") == -9
    _, skeleton, settled = open_checkpoint(source, RECIPE)
    needed = sum(disk_bytes(skeleton, settled, WINDOWS.numel()))
    taken = sum(disk.bytes_in(tmp_path / "out.partial" / name) for name in ("blocks", "state"))
    assert 0 < taken < needed
    _disk(
        monkeypatch, {tmp_path: _asked(needed - taken // 2)}
    )  # half of it: a kill leaves more than the resumed run keeps
    with pytest.raises(OutputError, match="not enough disk space"):
        _run(source, tmp_path / "another", IN_MEMORY)
    _run(source, out, IN_MEMORY)


def test_the_next_block_alone_is_read_ahead(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    real = Checkpoint.prefetch

    def prefetch(self: Checkpoint, names: Any) -> None:
        asked.append(list(names))
        real(self, asked[-1])

    advised: list[int] = []
    monkeypatch.setattr(Checkpoint, "prefetch", prefetch)
    monkeypatch.setattr(os, "posix_fadvise", lambda _fd, _start, size, _advice: advised.append(size))
    _run(source, tmp_path / "out", Placement(2))
    assert [{int(name.split(".")[2]) for name in names} for names in asked] == [{1}, {2}], (
        "one block, and none after the last"
    )
    assert all(len(names) == 9 for names in asked) and len(advised) == 18
    hidden = tiny_models.HIDDEN
    assert sum(advised[:9]) == 4 * (3 * hidden**2 + 9 * hidden**2 + 2 * hidden)


def test_out_of_memory_on_the_cpu_ends_on_disk(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    last = Placement(1, replay=True, host_streams=True, in_place=True)
    expected, get, failed = _run(source, tmp_path / "expected", last), StatePlaces.get, []

    def starved(self: StatePlaces, hidden: torch.Tensor, device: torch.device) -> torch.Tensor:
        if not self.placement.disk_streams:
            failed.append(self.placement)
            raise torch.OutOfMemoryError("DefaultCPUAllocator: can't allocate memory")
        return get(self, hidden, device)

    monkeypatch.setattr(StatePlaces, "get", starved)
    found = _run(source, tmp_path / "out", last)
    assert failed == [last]
    assert found["model.safetensors"] == expected["model.safetensors"]

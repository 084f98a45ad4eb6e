"""storage/files.py: a file is complete or absent, and one process at a time holds a lock."""

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from leangrid.errors import OutputError
from leangrid.storage import failpoints, files


def test_atomic_write_returns_the_hash_of_what_it_wrote(tmp_path: Path) -> None:
    path = tmp_path / "file"
    big = os.urandom(files.CHUNK + 17)
    for chunks in (b"", b"one", [b"one", bytearray(b"two"), memoryview(b"three")], big, iter([big, b"", big])):
        content = b"".join(
            [big, big] if isinstance(chunks, Iterator) else [chunks] if isinstance(chunks, bytes) else chunks
        )
        assert files.atomic_write(path, chunks) == hashlib.sha256(content).hexdigest() == files.hash_file(path)
        assert path.read_bytes() == content
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    def failing() -> Iterator[bytes]:
        yield b"new"
        raise RuntimeError("the caller's own fault")

    files.atomic_write(tmp_path / "file", b"old")
    with pytest.raises(RuntimeError, match="own fault"):
        files.atomic_write(tmp_path / "file", failing())
    assert (tmp_path / "file").read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_mode_follows_the_umask_and_links_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"victim")
    (tmp_path / "link").symlink_to("victim")
    before = os.umask(0o027)
    try:
        files.atomic_write(tmp_path / "link", b"new")
    finally:
        os.umask(before)
    assert (tmp_path / "victim").read_bytes() == b"victim"
    assert not (tmp_path / "link").is_symlink()
    assert stat.S_IMODE((tmp_path / "link").stat().st_mode) == 0o640


def test_short_writes_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:3]))
    files.atomic_write(tmp_path / "file", b"more than three bytes")
    assert (tmp_path / "file").read_bytes() == b"more than three bytes"


def test_read_chunks_covers_exactly_what_was_asked_for(tmp_path: Path) -> None:
    data = os.urandom(2 * files.CHUNK + 5)
    (tmp_path / "file").write_bytes(data)
    for start, length in ((0, None), (3, None), (0, 0), (5, 7), (1, files.CHUNK), (files.CHUNK - 1, files.CHUNK + 2)):
        got = b"".join(bytes(piece) for piece in files.read_chunks(tmp_path / "file", start, length))
        assert got == (data[start:] if length is None else data[start : start + length])
    with pytest.raises(files.SourceReadError, match="5 bytes early"):
        list(files.read_chunks(tmp_path / "file", 10, len(data) - 5))
    with pytest.raises(files.SourceReadError):
        list(files.read_chunks(tmp_path / "nothing"))


def test_remove_tree_does_not_follow_links(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("kept")
    (tmp_path / "gone" / "deep").mkdir(parents=True)
    (tmp_path / "gone" / "deep" / "link").symlink_to(tmp_path / "kept")
    files.remove_tree(tmp_path / "gone")
    files.remove_tree(tmp_path / "gone")
    assert (tmp_path / "kept" / "file").read_text() == "kept" and not (tmp_path / "gone").exists()


def test_sweep_removes_only_temporaries(tmp_path: Path) -> None:
    for name in (".a.1.ff.tmp", "b.tmp", ".hidden"):
        (tmp_path / name).write_text("")
    (tmp_path / ".dir.tmp").mkdir()
    assert files.sweep_temporaries(tmp_path) == 1
    assert {p.name for p in tmp_path.iterdir()} == {"b.tmp", ".hidden", ".dir.tmp"}
    assert files.sweep_temporaries(tmp_path / "nowhere") == 0


def test_one_lock_at_a_time(tmp_path: Path) -> None:
    first, second = files.FileLock(tmp_path / "LOCK"), files.FileLock(tmp_path / "LOCK")
    first.acquire()
    with pytest.raises(OutputError, match=f"process {os.getpid()} on "):
        second.acquire()
    assert first.held and not second.held
    first.release()
    first.release()
    assert not (tmp_path / "LOCK").exists()
    second.acquire()
    assert second.stale_owner is None  # it was given back, not left
    second.release()
    (tmp_path / "LOCK").write_text("rubbish")
    first.acquire()
    assert first.stale_owner == "an unreadable LOCK file"
    first.release()


def test_failpoint_actions(monkeypatch: pytest.MonkeyPatch) -> None:
    for setting, passages, expected in (
        ("a:2:raise:ENOSPC", ["a", "b", "a"], OSError),
        ("*:3:raise:OOM", ["a", "b", "c"], torch.OutOfMemoryError),
        ("a:1:raise:SIGINT", ["b", "a"], KeyboardInterrupt),
    ):
        failpoints.reset()
        monkeypatch.setenv("LEANGRID_FAILPOINT", setting)
        for name in passages[:-1]:
            failpoints.failpoint(name)
        with pytest.raises(expected):
            failpoints.failpoint(passages[-1])
        failpoints.failpoint(passages[-1])  # once
    failpoints.reset()
    monkeypatch.setenv("LEANGRID_FAILPOINT", "a:1:explode")
    with pytest.raises(ValueError, match="explode"):
        failpoints.failpoint("a")

"""The only place that writes files. A file is there whole or not at all, also after a kill or a power cut.

The protocol (SQLite's and git's): a temporary file beside the target, written and hashed in one pass, fsync,
``os.replace``, fsync of the directory. Names of temporaries start with a dot and end in ``.tmp``, so that whoever holds
the lock of a run may sweep what a kill left."""

import contextlib
import errno
import fcntl
import hashlib
import json
import mmap
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from leangrid.errors import OutputError
from leangrid.storage.failpoints import failpoint

Bytes = bytes | bytearray | memoryview

# Small enough to stay in the cache between hashing and writing, large enough that the calls cost nothing.
CHUNK = 4 << 20


def atomic_write(path: Path, chunks: Bytes | Iterable[Bytes], size: int | None = None) -> str:
    """Write ``path`` whole or not at all; return the sha256 (hex) of its bytes.

    ``size``, in bytes, is only for the message of a full disk. Raises OutputError (exit code 3: what was finished
    before is safe) naming the path and the step that failed; exceptions of ``chunks`` pass through. No temporary file
    stays behind."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    digest, step, descriptor, written = hashlib.sha256(), "create", -1, 0
    try:
        failpoint("write.before_create")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        failpoint("write.after_create")
        for piece in _pieces(chunks):
            step = "write"
            digest.update(piece)
            _write_fully(descriptor, piece)
            written += len(piece)
            failpoint("write.after_chunk")
        step = "fsync"
        failpoint("write.before_fsync")
        os.fsync(descriptor)
        step = "close"
        closing, descriptor = descriptor, -1
        os.close(closing)
        step = "rename"
        failpoint("write.before_rename")
        os.replace(temporary, path)
        failpoint("write.after_rename")
        step = "fsync of the directory of"
        sync_dir(path.parent)
        failpoint("write.after_sync")
    except BaseException as error:
        if descriptor >= 0:
            os.close(descriptor)
        _unlink_quietly(temporary)
        if isinstance(error, OSError) and not isinstance(error, SourceReadError):
            raise _stopped(step, path, error, size if size is not None else written) from error
        raise
    return digest.hexdigest()


def write_json(path: Path, value: object) -> str:
    """Write ``value`` as canonical JSON (sorted keys, one space of indent); return its sha256."""
    return atomic_write(path, json_bytes(value))


def json_bytes(value: object) -> bytes:
    """The one way leangrid spells JSON in files that are hashed."""
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


class SourceReadError(OSError):
    """A read that failed while its bytes were being copied: not the fault of the file being written."""


def read_chunks(path: Path, start: int = 0, length: int | None = None) -> Iterator[memoryview]:
    """The bytes ``start`` .. ``start + length`` of a file (to its end by default) through one reused buffer of CHUNK
    bytes.

    Each piece is valid until the next is asked for. Raises SourceReadError naming the file, also when it is shorter
    than asked for."""
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            left = os.fstat(file.fileno()).st_size - start if length is None else length
            buffer = memoryview(bytearray(min(CHUNK, max(left, 1))))
            while left > 0:
                count = file.readinto(buffer[: min(left, len(buffer))])
                if not count:
                    raise SourceReadError(errno.EIO, f"ends {left} bytes early", str(path))
                left -= count
                yield buffer[:count]
    except SourceReadError:
        raise
    except OSError as error:
        raise SourceReadError(error.errno, error.strerror, str(path)) from error


def scratch(directory: Path, size: int) -> mmap.mmap:
    """``size`` bytes of a file that has no name any more, mapped for reading and writing. It goes with its last
    reference, also in a kill.

    The space is taken at once: a mapped hole that the disk cannot fill would end the process. Raises OutputError (exit
    code 3)."""
    path, descriptor = directory / f".scratch.{os.getpid()}.{secrets.token_hex(4)}.tmp", -1
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        os.unlink(path)
        os.posix_fallocate(descriptor, 0, size)
        return mmap.mmap(descriptor, size)
    except OSError as error:
        raise _stopped("reserve", path, error, size) from error
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def hash_file(path: Path) -> str:
    """sha256 (hex) of a file's bytes; OSError passes."""
    digest = hashlib.sha256()
    for piece in read_chunks(path):
        digest.update(piece)
    return digest.hexdigest()


def link(path: Path, target: Path) -> None:
    """Make ``path`` a symbolic link to the file ``target``, for a directory that is thrown away."""
    os.symlink(target.resolve(), path)


def make_dir(path: Path) -> None:
    """Make a directory and its parents, durably; fine if it is there."""
    missing = [path]
    while not missing[-1].parent.exists():
        missing.append(missing[-1].parent)
    for directory in reversed(missing):
        try:
            failpoint("dir.before_make")
            _mkdir(directory)
            sync_dir(directory.parent)
            failpoint("dir.after_make")
        except OSError as error:
            raise _refused("make the directory", directory, error) from error


def _mkdir(directory: Path) -> None:
    try:
        os.mkdir(directory)
    except FileExistsError:
        if not directory.is_dir():
            raise


def remove(path: Path) -> None:
    """Remove a file, an empty directory's entry or nothing if it is gone; OutputError otherwise."""
    try:
        failpoint("remove.before")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        failpoint("remove.after")
    except OSError as error:
        raise _stopped("remove", path, error, 0) from error


def remove_tree(path: Path) -> None:
    """Remove a directory with all it holds, without following links; fine if it is gone."""
    if path.is_symlink() or path.is_file():
        return remove(path)
    if not path.is_dir():
        return None
    for entry in sorted(path.iterdir()):
        remove_tree(entry)
    try:
        failpoint("remove.before_rmdir")
        os.rmdir(path)
    except OSError as error:
        raise _stopped("remove", path, error, 0) from error


def remove_if_empty(path: Path) -> None:
    """Remove a directory that holds nothing; one that another process has begun to use stays."""
    try:
        os.rmdir(path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
            raise _stopped("remove", path, error, 0) from error


def move_dir(staged: Path, final: Path) -> None:
    """Rename a directory and make the new name durable: the moment at which a result exists."""
    try:
        sync_dir(staged)
        failpoint("publish.before_rename")
        os.replace(staged, final)
        failpoint("publish.after_rename")
        sync_dir(final.parent)
        sync_dir(staged.parent)
        failpoint("publish.after_sync")
    except OSError as error:
        raise _stopped(f"rename {staged} to", final, error, 0) from error


def move_entry(path: Path, directory: Path) -> None:
    """Rename a file or directory into another directory, durably before the next such step."""
    try:
        failpoint("publish.before_rename")
        os.replace(path, directory / path.name)
        failpoint("publish.after_rename")
        sync_dir(directory)
        sync_dir(path.parent)
        failpoint("publish.after_sync")
    except OSError as error:
        raise _stopped(f"move {path} into", directory, error, 0) from error


def is_mount(path: Path) -> bool:
    """Whether a file system, or a part of one, is mounted at ``path``: a rename of it, or onto it, fails."""
    if os.path.ismount(path):
        return True
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return False
    name = os.fsencode(os.path.realpath(path))
    return any(line.split()[4].decode("unicode_escape").encode("latin-1") == name for line in lines)


def sync_names(directory: Path) -> None:
    """Make every change of names in a directory durable before the next; OutputError otherwise."""
    try:
        failpoint("dir.before_sync")
        sync_dir(directory)
    except OSError as error:
        raise _stopped("sync", directory, error, 0) from error


def sync_dir(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network and FUSE file systems cannot sync a directory at all; there the rename is as durable as they make
        # it.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def sweep_temporaries(directory: Path) -> int:
    """Remove what killed writers left in ``directory`` (not below it); return how many files. Only the holder of the
    lock may call it."""
    stale = [p for p in directory.glob(".*.tmp") if p.is_file() or p.is_symlink()] if directory.is_dir() else []
    for path in stale:
        remove(path)
    return len(stale)


def require_space(directory: Path, needed: int, margin: float = 0.05) -> None:
    """Refuse (OutputError) when the file system of ``directory`` has fewer than ``needed`` bytes free, plus 5%."""
    existing = directory
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    free, wanted = shutil.disk_usage(existing).free, int(needed * (1 + margin))
    if free < wanted:
        raise OutputError(f"not enough disk space: about {_size(wanted)} needed, {_size(free)} free", existing,
                          "Free some, or choose another directory")  # fmt: skip


def same_disk(one: Path, other: Path) -> bool:
    """Whether two directories that exist lie on one file system."""
    return one.stat().st_dev == other.stat().st_dev


def bytes_in(directory: Path) -> int:
    """Bytes of the files in a directory (not below it); 0 where there is none."""
    return sum(path.stat().st_size for path in directory.iterdir() if path.is_file()) if directory.is_dir() else 0


class FileLock:
    """One process at a time in a run directory. The kernel drops the lock with the process, so a kill never leaves it
    held; the file's text (pid, host, start) is for the message that the second process prints."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = -1
        self.stale_owner: str | None = None  # who left the file without removing it: takeover is worth a notice

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._descriptor >= 0

    def acquire(self) -> None:
        """Take the lock; OutputError naming the owner's pid and host if another process holds it."""
        while True:
            try:
                descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except OSError as error:
                raise _refused("lock", self.path, error) from error
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                owner = _owner(descriptor)
                os.close(descriptor)
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    raise OutputError(f"another leangrid is at work here: {owner or 'owner unknown'}", self.path,
                                      "Wait for it, stop it, or choose another output directory") from None  # fmt: skip
                raise _refused("lock", self.path, error) from error
            try:
                current = os.stat(self.path)
            except FileNotFoundError:
                current = None
            held = os.fstat(descriptor)
            if current is not None and (current.st_ino, current.st_dev) == (held.st_ino, held.st_dev):
                break
            os.close(descriptor)  # the owner removed the file between our open and our flock: what we hold is no lock
        self._descriptor, self.stale_owner = descriptor, _owner(descriptor)
        text = json.dumps(
            {"pid": os.getpid(), "host": socket.gethostname(), "started": time.strftime("%Y-%m-%d %H:%M:%S")}
        )
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text.encode(), 0)

    def release(self) -> None:
        """Remove the file and drop the lock; fine if it was never taken."""
        if self._descriptor >= 0:
            _unlink_quietly(self.path)
            os.close(self._descriptor)
            self._descriptor = -1


def _owner(descriptor: int) -> str | None:
    try:
        entry = json.loads(os.pread(descriptor, 4096, 0) or b"null")
        return None if entry is None else f"process {entry['pid']} on {entry['host']} since {entry['started']}"
    except (ValueError, KeyError, TypeError, OSError):
        return "an unreadable LOCK file"


def _pieces(chunks: Bytes | Iterable[Bytes]) -> Iterator[memoryview]:
    if isinstance(chunks, bytes | bytearray | memoryview):
        yield from _slices(memoryview(chunks))
        return
    for chunk in chunks:
        yield from _slices(memoryview(chunk))


def _slices(view: memoryview) -> Iterator[memoryview]:
    flat = view.cast("B")
    for start in range(0, len(flat), CHUNK):
        yield flat[start : start + CHUNK]


def _write_fully(descriptor: int, piece: memoryview) -> None:
    while len(piece):
        piece = piece[os.write(descriptor, piece) :]


def _unlink_quietly(path: Path) -> None:
    try:
        os.unlink(path)
    except OSError:  # already renamed or gone; the error being reported is the one that matters
        return


def _stopped(step: str, path: Path, error: OSError, size: int) -> OutputError:
    """The message of an OSError in the middle of a run: what was committed stays, so the same command resumes (exit
    code 3)."""
    failure = _refused(step, path, error, size)
    failure.exit_code = 3
    return failure


def _refused(step: str, path: Path, error: OSError, size: int = 0) -> OutputError:
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        try:
            free = _size(shutil.disk_usage(path.parent).free)
        except OSError:
            free = "an unknown amount"
        return OutputError(f"cannot {step} the file: {reason}; it needs {_size(size)}, {free} is free", path,
                           "Free some space and run the same command again: it resumes")  # fmt: skip
    if error.errno == errno.EXDEV:
        return OutputError(f"cannot {step}: {reason}", path, "No part of the output may lie on another file system")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return OutputError(
            f"cannot {step}: {reason}",
            path,
            "Give this user the right to write there, or choose another output directory",
        )
    return OutputError(f"cannot {step}: {reason}", path, "Check the disk, then run the same command again")


def _size(count: int) -> str:
    return f"{count} bytes ({count / 2**30:.2f} GiB)" if count >= 2**27 else f"{count} bytes"

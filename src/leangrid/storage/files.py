"""The only module that writes files. A file appears complete or not at all, even after a kill or a power cut.

How, as SQLite and git do it: write a temporary file beside the target and hash it in the same pass, fsync it,
``os.replace`` it to its name, fsync the directory. The names of temporary files begin with a dot and end in ``.tmp``,
so the process that holds the lock of a run can remove those that a killed process left."""

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
from leangrid.storage.disk import format_bytes
from leangrid.storage.failpoints import failpoint

Bytes = bytes | bytearray | memoryview

# Bytes. Small enough to stay in the cache between hashing and writing, large enough that the calls cost nothing.
CHUNK = 4 << 20


def atomic_write(path: Path, chunks: Bytes | Iterable[Bytes], size: int | None = None) -> str:
    """Write ``chunks`` to the file ``path``, completely or not at all, and return the sha256 of its bytes in hex.

    Args:
        chunks: the content, in one piece or as an iterable of pieces.
        size: the size in bytes, only for the message about a full disk; None: the bytes written so far.

    Raises:
        OutputError: with exit code 3 (what was finished before is safe), naming the path and the step that failed.
            Exceptions of ``chunks`` itself pass through. No temporary file is left in either case.
    """
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
    """Write ``value`` as ``json_bytes`` formats it and return the sha256 of the file in hex."""
    return atomic_write(path, json_bytes(value))


def json_bytes(value: object) -> bytes:
    """``value`` as JSON in UTF-8, always with the same bytes: sorted keys, an indent of one space, a final newline."""
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


class SourceReadError(OSError):
    """A file could not be read while its bytes were being copied, so the file being written is not at fault."""


def read_chunks(path: Path, start: int = 0, length: int | None = None) -> Iterator[memoryview]:
    """Yield the bytes of a file from ``start`` on in pieces of at most CHUNK bytes.

    ``length`` is the number of bytes; None reads to the end. All pieces share one buffer, so each is valid only until
    the next is requested. Raises SourceReadError naming the file if it cannot be read or is shorter than requested."""
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


def map_scratch_file(directory: Path, size: int) -> mmap.mmap:
    """Map ``size`` bytes of a new file without a name in ``directory``, for reading and writing.

    The name is removed at once, so the file disappears with its last reference, also when the process is killed. The
    space is allocated at once too: writing to a mapped hole that the disk cannot hold would end the process with a
    signal. Raises OutputError (exit code 3) if the disk is full."""
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


def hash_file(*paths: Path) -> str:
    """The sha256, in hex, of a file's bytes; of several files, of their bytes one after another. OSError if one of them
    cannot be read."""
    digest = hashlib.sha256()
    for path in paths:
        for piece in read_chunks(path):
            digest.update(piece)
    return digest.hexdigest()


def make_link(path: Path, target: Path) -> None:
    """Make ``path`` a symbolic link to the file ``target``. Only for temporary directories: it is not made durable."""
    os.symlink(target.resolve(), path)


def make_dir(path: Path) -> None:
    """Make a directory and its missing parents, durably; one that exists is left as it is. OutputError on failure."""
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
    """Remove a file or a link. Does nothing if there is none; OutputError if it cannot be removed."""
    try:
        failpoint("remove.before")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        failpoint("remove.after")
    except OSError as error:
        raise _stopped("remove", path, error, 0) from error


def remove_tree(path: Path) -> None:
    """Remove a directory with everything in it, without following links. Does nothing if there is none."""
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
    """Remove a directory if it is empty. One that another process has begun to use stays."""
    try:
        os.rmdir(path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
            raise _stopped("remove", path, error, 0) from error


def rename_dir(staged: Path, final: Path) -> None:
    """Rename the directory ``staged`` to ``final`` and make the new name durable. From then on the result exists."""
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


def move_into(path: Path, directory: Path) -> None:
    """Move a file or directory into ``directory``, under the same name, and make that durable."""
    try:
        failpoint("publish.before_rename")
        os.replace(path, directory / path.name)
        failpoint("publish.after_rename")
        sync_dir(directory)
        sync_dir(path.parent)
        failpoint("publish.after_sync")
    except OSError as error:
        raise _stopped(f"move {path} into", directory, error, 0) from error


def sync_names(directory: Path) -> None:
    """As ``sync_dir``, but a failure is an OutputError (exit code 3) for the user."""
    try:
        failpoint("dir.before_sync")
        sync_dir(directory)
    except OSError as error:
        raise _stopped("sync", directory, error, 0) from error


def sync_dir(path: Path) -> None:
    """Make the creations, renames and removals in a directory durable (fsync). Raises OSError if that fails."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network and FUSE file systems cannot fsync a directory at all: their renames are as durable as they are.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def sweep_temporaries(directory: Path) -> int:
    """Remove the temporary files that killed processes left in ``directory``, without its subdirectories.

    Returns how many there were. Only the process that holds the lock of the run may call this."""
    stale = [p for p in directory.glob(".*.tmp") if p.is_file() or p.is_symlink()] if directory.is_dir() else []
    for path in stale:
        remove(path)
    return len(stale)


class FileLock:
    """A lock file that lets one process at a time use a run directory.

    The kernel releases the lock (``flock``) when the process ends, so a kill never leaves it held. The text of the file
    (process id, host, start time) is for the message that a second process shows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = -1
        self.stale_owner: str | None = None  # the process that ended without removing the file, for a notice

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._descriptor >= 0

    def acquire(self) -> None:
        """Take the lock. Raises OutputError naming the process and host that hold it, if any do."""
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
            os.close(descriptor)  # the owner removed the file between our open and our flock: open the new one
        self._descriptor, self.stale_owner = descriptor, _owner(descriptor)
        text = json.dumps(
            {"pid": os.getpid(), "host": socket.gethostname(), "started": time.strftime("%Y-%m-%d %H:%M:%S")}
        )
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text.encode(), 0)

    def release(self) -> None:
        """Remove the file and release the lock. Does nothing if the lock is not held."""
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
    """The error for a failure during a run, with exit code 3: committed blocks stay, so the same command resumes."""
    failure = _refused(step, path, error, size)
    failure.exit_code = 3
    return failure


def _refused(step: str, path: Path, error: OSError, size: int = 0) -> OutputError:
    """The error for an OSError at ``step``, with what the user can do about its errno."""
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        try:
            free = format_bytes(shutil.disk_usage(path.parent).free)
        except OSError:
            free = "an unknown amount"
        return OutputError(f"cannot {step} the file: {reason}; it needs {format_bytes(size)}, {free} is free", path,
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

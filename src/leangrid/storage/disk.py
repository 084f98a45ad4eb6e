"""Questions about the file systems that a run writes to: how much is free, which is which, what is mounted where."""

import os
import shutil
from pathlib import Path

from leangrid.errors import OutputError

_MARGIN = 0.05  # of the bytes that are needed: file systems spend some of their own on every file


def require_space(directory: Path, needed: int) -> None:
    """Raise OutputError if the file system of ``directory`` has less free than ``needed`` bytes and 5% more.

    The directory need not exist yet: its nearest parent that exists is asked."""
    existing = directory
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    free, wanted = shutil.disk_usage(existing).free, int(needed * (1 + _MARGIN))
    if free < wanted:
        what = f"not enough disk space: about {format_bytes(wanted)} needed, {format_bytes(free)} free"
        raise OutputError(what, existing, "Free some, or choose another directory")


def same_disk(one: Path, other: Path) -> bool:
    """Whether two directories, which must exist, are on one file system."""
    return one.stat().st_dev == other.stat().st_dev


def bytes_in(directory: Path) -> int:
    """The total size in bytes of the files in a directory, without its subdirectories; 0 if there is no directory."""
    return sum(path.stat().st_size for path in directory.iterdir() if path.is_file()) if directory.is_dir() else 0


def is_mount(path: Path) -> bool:
    """Whether a file system, or a part of one (a bind mount), is mounted at ``path``. A mount point cannot be renamed,
    and nothing can be renamed to its name."""
    if os.path.ismount(path):
        return True
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return False
    name = os.fsencode(os.path.realpath(path))
    return any(line.split()[4].decode("unicode_escape").encode("latin-1") == name for line in lines)


def format_bytes(count: int) -> str:
    """A size for a message: in bytes, from 128 MiB on also in GiB."""
    return f"{count} bytes ({count / 2**30:.2f} GiB)" if count >= 2**27 else f"{count} bytes"

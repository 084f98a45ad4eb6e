"""How much memory the process holds, held at most, and may still take."""

import contextlib
import ctypes
import os
import resource
import sys
from pathlib import Path

import psutil

_M_MMAP_THRESHOLD, _LARGE = -3, 1 << 20
_GROUPS = Path("/sys/fs/cgroup")
# Limit, use, and the part of the use that is page cache, in both generations of control groups.
_CACHE = ("total_inactive_file", "total_active_file", "inactive_file", "active_file")
_FILES = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))


def peak_bytes() -> int:
    """Largest resident size of this process so far.

    Linux: VmHWM, because ru_maxrss survives an exec and would show a large parent's peak.
    """
    try:
        return _status("VmHWM:")
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def _status(field: str) -> int:
    """A field of /proc/self/status in bytes; OSError or StopIteration where there is none."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def resident_bytes() -> int:
    """Resident size of this process now; the peak where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return peak_bytes()
    return pages * os.sysconf("SC_PAGE_SIZE")


def available_bytes() -> int:
    """What the process may still take: what the machine has left, and no more than its control groups (containers,
    Slurm, systemd) and its own limits leave. Page cache counts as free: the system gives it up when it is needed."""
    left = [psutil.virtual_memory().available, *_left_in_groups()]
    left += [limit - _status(field) for field, limit in _own_limits().items()]
    return max(0, min(left))


def maps(size: int) -> bool:
    """Whether a file of ``size`` bytes may be mapped into memory: its pages cost nothing, but a limit on addresses
    counts them."""
    return all(size < limit - _status(field) for field, limit in _own_limits().items())


def spare_addresses() -> None:
    """Where the process's addresses are limited, let the C library map each large piece by itself and give it back when
    it is freed: in its heap they leave holes that are no memory, but count. It costs page faults, so not elsewhere."""
    if _own_limits():
        with contextlib.suppress(OSError, AttributeError):  # glibc alone has the call
            ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE)


def _own_limits() -> dict[str, int]:
    """Bytes that the process may have, by the field of /proc/self/status that counts them."""
    limits = {
        "VmData:": resource.getrlimit(resource.RLIMIT_DATA)[0],
        "VmSize:": resource.getrlimit(resource.RLIMIT_AS)[0],
    }
    return {field: limit for field, limit in limits.items() if limit != resource.RLIM_INFINITY}


def _left_in_groups(root: Path = _GROUPS, mine: Path = Path("/proc/self/cgroup")) -> list[int]:
    """Bytes that the memory limit of each control group over this process leaves."""
    try:
        lines = mine.read_text().splitlines()
    except OSError:  # no Linux
        return []
    left = []
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if kinds not in ("", "memory"):
            continue
        top = root / kinds
        group = top / path.strip("/")
        for folder in (group, *group.parents):
            left += [free for names in _FILES if (free := _left_in(folder, *names)) is not None]
            if folder == top:
                break
    return left


def _left_in(folder: Path, limit: str, used: str) -> int | None:
    try:
        allowed = (folder / limit).read_text().strip()
        if allowed == "max":
            return None
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        names = _CACHE[:2] if "total_active_file" in stat else _CACHE[2:]
        return int(allowed) - int((folder / used).read_text()) + sum(int(stat[name]) for name in names)
    except (
        OSError,
        ValueError,
        KeyError,
    ):  # the root group has no limit; inside a container the outer ones are not shown
        return None


def return_free() -> None:
    """Give memory that was freed back to the system where the C library keeps it: after a whole model was loaded, that
    is most of it."""
    with contextlib.suppress(OSError, AttributeError):  # glibc alone has the call
        ctypes.CDLL(None).malloc_trim(0)

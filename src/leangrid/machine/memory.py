"""How much memory the process uses, used at most, and may still use; all sizes in bytes."""

import contextlib
import ctypes
import gc
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

_M_MMAP_THRESHOLD, _LARGE = -3, 1 << 20  # an option of glibc's mallopt, and its value in bytes
_KEPT = (32 << 20) - 8192  # bytes: with its header and rounded to pages no more than glibc's DEFAULT_MMAP_THRESHOLD_MAX
_GROUPS = Path("/sys/fs/cgroup")
# Control groups, versions 1 and 2: the names of page cache in memory.stat, and the files with limit and use.
_CACHE = ("total_inactive_file", "total_active_file", "inactive_file", "active_file")
_FILES = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))


def peak_bytes() -> int:
    """The largest resident size of this process so far.

    On Linux this is VmHWM: ru_maxrss would include the peak of a parent process from before the exec."""
    try:
        return _status("VmHWM:")
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def _status(field: str) -> int:
    """A field of /proc/self/status, in bytes. OSError or StopIteration if there is none."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def resident_bytes() -> int:
    """The resident size of this process now; its peak on systems without /proc."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return peak_bytes()
    return pages * os.sysconf("SC_PAGE_SIZE")


def available_bytes() -> int:
    """How much more memory the process may use.

    It is the least of what the machine has free, what the limits of its control groups leave (containers, Slurm,
    systemd), and what its own limits leave. Page cache counts as free, because the system gives it up on demand."""
    left = [psutil.virtual_memory().available, *_left_in_groups()]
    left += [limit - _status(field) for field, limit in _own_limits().items()]
    return max(0, min(left))


def can_map(size: int) -> bool:
    """Whether a file of ``size`` bytes can be mapped: its pages need no memory, but count against address limits."""
    return all(size < limit - _status(field) for field, limit in _own_limits().items())


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Context: Python does not look for cycles of garbage. Where a hundred thousand objects are made that all stay, it
    would look through all of them again and again: a fifth of the time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def avoid_heap_holes() -> None:
    """Let the C library map each large allocation separately, if the addresses of the process are limited.

    Freed allocations in its heap would leave holes, which use no memory but count against such a limit. Without a
    limit nothing is changed, because separate mappings cost page faults."""
    if _own_limits():
        with contextlib.suppress(OSError, AttributeError):  # only glibc has mallopt
            ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE)


def keep_freed_memory() -> None:
    """Let the C library keep freed memory of some megabytes for the next allocation.

    glibc maps each large allocation separately and faults its pages in again each time, until one as large was freed
    (the dynamic threshold of mallopt(3), at most 32 MB). A pass over thousands of small activations takes almost twice
    as long before than behind. The one that is freed here is never written to."""
    bytes(_KEPT)


def _own_limits() -> dict[str, int]:
    """The limits of the process that are set, by the field of /proc/self/status that counts against each."""
    limits = {
        "VmData:": resource.getrlimit(resource.RLIMIT_DATA)[0],
        "VmSize:": resource.getrlimit(resource.RLIMIT_AS)[0],
    }
    return {field: limit for field, limit in limits.items() if limit != resource.RLIM_INFINITY}


def _left_in_groups(root: Path = _GROUPS, mine: Path = Path("/proc/self/cgroup")) -> list[int]:
    """What the memory limit of each control group of this process leaves, its parent groups included."""
    try:
        lines = mine.read_text().splitlines()
    except OSError:  # not Linux
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
    """What the control group at ``folder`` leaves; None if it has no limit or none that can be read."""
    try:
        allowed = (folder / limit).read_text().strip()
        if allowed == "max":
            return None
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        names = _CACHE[:2] if "total_active_file" in stat else _CACHE[2:]
        return int(allowed) - int((folder / used).read_text()) + sum(int(stat[name]) for name in names)
    except (OSError, ValueError, KeyError):
        return None  # the root group has no limit, and a container does not show its outer groups


def return_freed_memory() -> None:
    """Give freed memory that the C library keeps back to the system, which is much after a whole model was loaded."""
    with contextlib.suppress(OSError, AttributeError):  # only glibc has malloc_trim
        ctypes.CDLL(None).malloc_trim(0)

"""How much memory the process holds, and held at most."""

import contextlib
import ctypes
import os
import resource
import sys
from pathlib import Path


def peak_bytes() -> int:
    """Largest resident size of this process so far.

    Linux: VmHWM, because ru_maxrss survives an exec and would show a large parent's peak.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes() -> int:
    """Resident size of this process now; the peak where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return peak_bytes()
    return pages * os.sysconf("SC_PAGE_SIZE")


def return_free() -> None:
    """Give memory that was freed back to the system where the C library keeps it: after a whole model was loaded, that is most of it."""
    with contextlib.suppress(OSError, AttributeError):  # glibc alone has the call
        ctypes.CDLL(None).malloc_trim(0)

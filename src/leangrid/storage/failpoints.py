"""Named points at which a test can stop the program; they do nothing unless LEANGRID_FAILPOINT is set.

``LEANGRID_FAILPOINT=name[:n[:action]]`` acts at the n-th call (default 1) of ``failpoint("name")``; the name ``*``
stands for every failpoint. Actions: ``kill`` (SIGKILL, the default), ``raise:ENOSPC`` (any errno name), ``raise:OOM``,
``raise:SIGINT``, ``sleep:SECONDS``. The tests find the names by searching the source for ``failpoint("``."""

import errno
import os
import signal
import time

import torch

_passages = 0


def failpoint(name: str) -> None:
    """Do nothing, or the action that LEANGRID_FAILPOINT names if this is the call it names."""
    wanted = os.environ.get("LEANGRID_FAILPOINT")
    if not wanted:
        return
    target, _, rest = wanted.partition(":")
    count, _, action = rest.partition(":")
    if target not in ("*", name):
        return
    global _passages
    _passages += 1
    if _passages == int(count or 1):
        _act(action or "kill", name)


def reset() -> None:
    """Count calls from zero again, for tests that stay in one process."""
    global _passages
    _passages = 0


def _act(action: str, name: str) -> None:
    verb, _, argument = action.partition(":")
    if verb == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif verb == "sleep":
        time.sleep(float(argument or 1))
    elif verb == "raise" and argument == "OOM":
        raise torch.OutOfMemoryError(f"failpoint {name}")
    elif verb == "raise" and argument == "SIGINT":
        raise KeyboardInterrupt(f"failpoint {name}")
    elif verb == "raise":
        raise OSError(getattr(errno, argument), f"{os.strerror(getattr(errno, argument))} (failpoint {name})")
    else:
        raise ValueError(f"LEANGRID_FAILPOINT: unknown action '{action}'")

"""Measures a run by stage: seconds of wall time, and floating-point operations."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from leangrid.machine.flops import FlopCounts

# Always reported, as INTERFACE.md says; other stages, such as "baseline", are added as they occur.
STAGES = ("load", "calibrate", "hessian", "factor", "grid", "solve", "pack", "save")


class Clock:
    """Adds up seconds of wall time by stage, and ``flops``. Stages must not be nested."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.seconds: dict[str, float] = dict.fromkeys(STAGES, 0.0)
        self.flops = FlopCounts()
        self._lap: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time inside the ``with`` to the stage ``name``."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - begin)

    def add(self, name: str, seconds: float) -> None:
        """Add ``seconds`` that were measured elsewhere to the stage ``name``."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def elapsed(self) -> float:
        """Seconds since the clock was created."""
        return time.perf_counter() - self.started

    def lap(self) -> dict[str, float]:
        """What ``report`` has added since the last call. A run stores one for each block, so that a resumed run can add
        up those of all its processes."""
        now, before = self.report(), self._lap
        self._lap = now
        return {name: round(value - before.get(name, 0.0), 3) for name, value in now.items()}

    def report(self) -> dict[str, float]:
        """The seconds so far: {"total": ..., stage: ...}, rounded to milliseconds."""
        return {"total": round(self.elapsed(), 3)} | {name: round(value, 3) for name, value in self.seconds.items()}

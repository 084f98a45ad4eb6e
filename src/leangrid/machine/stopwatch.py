"""Where the time goes: seconds by stage, and the work done in them."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from leangrid.machine.flops import Work

STAGES = ("load", "calibrate", "hessian", "factor", "grid", "solve", "pack", "save")  # promised; "baseline" joins them


class Clock:
    """Adds up wall seconds by stage; stages do not nest."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.seconds: dict[str, float] = dict.fromkeys(STAGES, 0.0)
        self.work = Work()
        self._lap: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time inside the ``with`` as ``name``."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - begin)

    def add(self, name: str, seconds: float) -> None:
        """Count ``seconds`` that were measured elsewhere."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def elapsed(self) -> float:
        """Seconds since the clock was made."""
        return time.perf_counter() - self.started

    def lap(self) -> dict[str, float]:
        """What ``report`` counts since the last lap: a run that is resumed has a lap for every block, in whichever
        process."""
        now, before = self.report(), self._lap
        self._lap = now
        return {name: round(value - before.get(name, 0.0), 3) for name, value in now.items()}

    def report(self) -> dict[str, float]:
        """{"total": ..., stage: ...}, rounded to milliseconds."""
        return {"total": round(self.elapsed(), 3)} | {name: round(value, 3) for name, value in self.seconds.items()}

"""After which blocks hidden states are saved: seldom where that is slow, and often enough that a kill costs little.

A run that is stopped and finds no states before its next block computes them once more, from the newest that it has,
through finished blocks (run/catch_up.py). So states that are slow to write are not worth writing after every block: two
streams of 128 x 2048 x 4096 in bfloat16 are 4.3 GB, which a GPU makes in less time than a disk takes to keep them."""

import time
from collections.abc import Callable

SMALL = 1 << 28  # bytes that are saved after every block
SHARE = 0.05  # of a run that larger ones may take
MOST_LOST = 600.0  # seconds of work after which they are saved whatever that takes
_BYTES_A_SECOND = 0.5e9  # written, hashed and synced, before any were


class StateSchedule:
    """Says when the states of one run are due.

    Args:
        now: the time in seconds, from any beginning.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._last = now, now()
        self._seconds_a_byte = 1 / _BYTES_A_SECOND

    def is_due(self, size: int) -> bool:
        """Whether states of ``size`` bytes are worth saving now: they are small, or saving them takes at most ``SHARE``
        of the time since the last that were saved, or that is ``MOST_LOST`` ago."""
        worked = self._now() - self._last
        return size <= SMALL or worked >= min(size * self._seconds_a_byte / SHARE, MOST_LOST)

    def note_saved(self, size: int, seconds: float) -> None:
        """States of ``size`` bytes were saved in ``seconds``."""
        self._last, self._seconds_a_byte = self._now(), seconds / max(size, 1)


def expected_seconds(size: int, each: float, blocks: int, rest: float) -> float:
    """Seconds in which a run of ``blocks`` blocks saves states of ``size`` bytes, which takes ``each`` seconds a time,
    where all else takes ``rest`` seconds."""
    if size <= SMALL:
        return blocks * each
    return min(blocks * each, rest * max(SHARE, each / MOST_LOST))

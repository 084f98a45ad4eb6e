"""What a run tells whoever watches it: how far it is, how fast, and how long it will take."""

from leangrid.machine import memory
from leangrid.machine.stopwatch import Clock
from leangrid.progress import Event, Progress


class RunProgress:
    """Makes the Events of a run of ``blocks`` blocks, of which ``done`` were finished before this process began.

    Attributes:
        blocks: how many blocks the model has.
    """

    def __init__(self, progress: Progress | None, clock: Clock, blocks: int, done: int, tokens: int) -> None:
        self.blocks = blocks
        self._progress, self._clock, self._done, self._tokens = progress, clock, done, tokens
        self._began = clock.elapsed()

    def report(self, stage: str, block: int, layer: str = "", loss: float = 0.0, message: str = "") -> None:
        """Send an Event, if anybody asked for them; ``stage`` and the others as Event has them."""
        if self._progress is None:
            return
        seconds = self._clock.elapsed() - self._began
        done = block + (stage == "block") - self._done
        left = seconds / done * (self.blocks - self._done - done) if done > 0 else -1.0
        speed = self._tokens * done / seconds if done > 0 else 0.0
        self._progress(Event(stage, block, self.blocks, layer, loss, speed, memory.resident_bytes(), left, message))

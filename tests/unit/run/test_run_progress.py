"""What a watcher is told of a resumed run: only this process's blocks count for the speed and the time left."""

from leangrid.machine.stopwatch import Clock
from leangrid.progress import Event
from leangrid.run.run_progress import RunProgress


class Stopped(Clock):
    """A clock that says what it is set to."""

    now = 0.0

    def elapsed(self) -> float:
        return self.now


def test_time_left_and_speed_are_of_this_process() -> None:
    events: list[Event] = []
    clock = Stopped()
    progress = RunProgress(events.append, clock, blocks=10, done=4, tokens=100)
    progress.report("layer", 4, layer="q")
    clock.now = 6.0
    progress.report("block", 5, loss=1.5)  # two of the six that were left: four take as long again, twice
    first, last = events
    assert first.seconds_left == -1.0 and first.tokens_per_second == 0.0 and first.layer == "q"
    assert last.seconds_left == 12.0 and last.tokens_per_second == 100 * 2 / 6.0 and last.blocks == 10
    RunProgress(None, clock, 10, 0, 100).report("block", 0)  # nobody asked

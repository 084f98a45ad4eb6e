"""When hidden states are saved: small ones always, large ones when it costs little or much would be lost."""

import pytest

from leangrid.storage.state_schedule import MOST_LOST, SHARE, SMALL, StateSchedule, expected_seconds


class Clock:
    """A clock that stands until it is told to go on."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def test_small_states_are_always_due() -> None:
    schedule = StateSchedule(Clock())
    assert schedule.is_due(SMALL) and not schedule.is_due(SMALL + 1)


def test_larger_ones_wait_until_saving_them_is_a_twentieth_of_the_work() -> None:
    clock, size = Clock(), 4 << 30
    schedule = StateSchedule(clock)
    schedule.note_saved(size, 9.0)
    clock.seconds = 179.0
    assert not schedule.is_due(size)
    clock.seconds = 181.0
    assert schedule.is_due(size) and not schedule.is_due(2 * size)
    schedule.note_saved(size, 1.0)  # from now on, and by what it took this time
    assert not schedule.is_due(size)
    clock.seconds += 21.0
    assert schedule.is_due(size)


def test_no_more_than_ten_minutes_are_lost_however_slow_the_disk_is() -> None:
    clock, size = Clock(), 64 << 30
    schedule = StateSchedule(clock)
    schedule.note_saved(size, 300.0)
    clock.seconds = MOST_LOST - 1
    assert not schedule.is_due(size)
    clock.seconds = MOST_LOST
    assert schedule.is_due(size)


def test_before_any_was_saved_a_disk_of_half_a_gigabyte_a_second_is_expected() -> None:
    clock = Clock()
    schedule = StateSchedule(clock)
    clock.seconds = 19.0
    assert not schedule.is_due(500_000_000)
    clock.seconds = 21.0
    assert schedule.is_due(500_000_000)


@pytest.mark.parametrize(
    ("size", "each", "wanted"),
    [
        (SMALL, 2.0, 64.0),  # every block
        (SMALL + 1, 2.0, 50.0),  # a twentieth of 1000 seconds
        (SMALL + 1, 1.0, 32.0),  # every block takes less than that
        (SMALL + 1, 60.0, 100.0),  # every ten minutes
    ],
)
def test_what_the_plan_expects(size: int, each: float, wanted: float) -> None:
    assert SHARE == 0.05 and MOST_LOST == 600.0
    assert expected_seconds(size, each, blocks=32, rest=1000.0) == pytest.approx(wanted)


def test_a_run_on_a_clock_spends_what_was_promised() -> None:
    """Blocks of three seconds, states that take nine to save: at most a twentieth of the work, and a kill at any time
    loses at most ten minutes of it."""
    clock, size, saving, since, longest = Clock(), 4 << 30, 0.0, 0.0, 0.0
    schedule = StateSchedule(clock)
    for _ in range(2000):
        clock.seconds += 3.0
        since += 3.0
        longest = max(longest, since)
        if schedule.is_due(size):
            clock.seconds += 9.0
            saving, since = saving + 9.0, 0.0
            schedule.note_saved(size, 9.0)
    assert 0.04 < saving / 6000.0 <= SHARE and longest <= MOST_LOST

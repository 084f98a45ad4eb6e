"""Opening a run: everything is checked and chosen once, in one pass, before the first block."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from leangrid.errors import LeangridError
from leangrid.machine.devices import DeviceClock, parse_device, reset_peak_device_bytes, set_threads
from leangrid.run.budget import choose_widths
from leangrid.run.inputs import check_values
from leangrid.run.open_on_ranks import open_inputs_on_ranks
from leangrid.run.publish import result_of_finished_run
from leangrid.run.ranks import Ranks, join_ranks
from leangrid.run.request import Request
from leangrid.run.result import QuantizeResult
from leangrid.run.run import Run
from leangrid.run.windows import calibration_windows


@contextmanager
def open_run(request: Request) -> Iterator[Run | QuantizeResult]:
    """The run that ``request`` asks for, locked and ready for its first block that is not finished.

    It is a result where nothing is left to do: the run was stopped after its directory had got its final name.

    Where torchrun started this process, it is this rank's part of the run, on this rank's device.

    Raises:
        LeangridError: bad input, before anything is written, or after what was written has been taken back: an
            ``out.partial`` of this run without a finished block is removed again.
    """
    set_threads(request.threads)
    with join_ranks(request.device) as (ranks, device):
        finished = ranks.broadcast(result_of_finished_run(request) if ranks.first else None)
        if finished is not None:
            yield finished
            return
        with _open(replace(request, device=device), ranks) as run:
            yield run


@contextmanager
def _open(request: Request, ranks: Ranks) -> Iterator[Run]:
    clock = DeviceClock(parse_device(request.device))
    reset_peak_device_bytes(request.device)
    with clock.stage("load"):
        inputs = open_inputs_on_ranks(request, ranks)  # source, skeleton, recipe, journal, placement
    journal, run = inputs.journal, None
    try:
        writes_own_text = inputs.recipe.samples_itself and request.windows is None
        with clock.stage("load"):
            if writes_own_text:  # a model that is broken writes no text
                check_values(inputs)
        with clock.stage("calibrate"):
            windows = ranks.broadcast(calibration_windows(inputs) if ranks.first else None)
        with clock.stage("load"):
            if not writes_own_text:  # a text that is refused waits for no weights
                check_values(inputs)
        ranks.share(windows)  # refuses fewer windows than ranks, before any work
        if inputs.recipe.has_budget:
            choose_widths(inputs, windows, clock, ranks)
        run = Run(inputs, windows, clock, ranks)
        yield run
    except LeangridError as error:
        if error.exit_code == 2 and journal.is_fresh and not journal.count_committed():
            journal.discard()
        raise
    finally:
        if run is not None:
            run.close()
        journal.close()

"""How a command ends: the promised exit codes, errors as one sentence on stderr, and signals that stop without breaking anything."""

import contextlib
import io
import json
import os
import shlex
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any, NoReturn

import typer

from leangrid.errors import LeangridError

BUG, BAD_INPUT, STOPPED = 1, 2, 3


class _Stop(BaseException):
    """A signal arrived. No ``except Exception`` on the way up can take it for a failure of its own."""


@contextlib.contextmanager
def outcome(quiet: bool = False, resumable: bool = False, debug: bool = False, kept: str = "finished blocks") -> Iterator[None]:
    """Run a command's body: LeangridError, signals and bugs become messages on stderr and typer.Exit with their code.

    Args:
        resumable: the same command goes on where it stopped, so a stop prints it.
        debug: tracebacks for every error, not for our bugs alone.
        kept: what it goes on with.
    """
    if quiet or not _interactive():
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars of the libraries below us
    with warnings.catch_warnings(), _signals():
        warnings.showwarning = _show_warning
        try:
            yield
        except typer.Exit:
            raise
        except (_Stop, KeyboardInterrupt) as stop:
            left = f"{kept} are kept" if resumable else "nothing was written"
            _fail(f"stopped{f' by {stop}' if str(stop) else ''}: {left}", STOPPED, debug, resume=True)
        except LeangridError as error:
            _fail(f"error: {error}", error.exit_code, debug, resume=error.exit_code == STOPPED)
        except OSError as error:
            place = f" ({error.filename})" if error.filename else ""
            _fail(f"error: {error.strerror or error}{place}", STOPPED if resumable else BAD_INPUT, debug, resume=resumable)
        except Exception:
            _fail("error: this is a bug of leangrid; the lines above and the command belong in a report", BUG, True, resume=False)


def emit(text: str, end: str = "\n") -> None:
    """Print a result on stdout. A reader that closed the pipe has seen enough: the command still ends well."""
    try:
        sys.stdout.write(text + end)
        sys.stdout.flush()
    except UnicodeEncodeError:
        encoding = sys.stdout.encoding or "ascii"
        sys.stdout.write(text.encode(encoding, "replace").decode(encoding) + end)
    except (BrokenPipeError, ValueError):
        sys.stdout = io.StringIO()  # Python flushes sys.stdout once more as it ends


def emit_json(value: Mapping[str, Any]) -> None:
    """One strict JSON object on one line; NaN and infinities become null."""
    emit(json.dumps(strict(value), allow_nan=False))


def say(text: str) -> None:
    """One line on stderr; a closed stderr is no reason to fail."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


def _fail(message: str, code: int, trace: bool, resume: bool) -> NoReturn:
    if trace:
        say(traceback.format_exc())
    say(message)
    if resume:
        say(f"to go on, run the same command: leangrid {shlex.join(sys.argv[1:])}")
    raise typer.Exit(code) from None


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """The first SIGINT or SIGTERM stops in good order; the second kills."""
    numbers = (signal.SIGINT, signal.SIGTERM)

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        for other in numbers:
            signal.signal(other, signal.SIG_DFL)
        raise _Stop(signal.Signals(number).name)

    try:
        before = {number: signal.signal(number, stop) for number in numbers}
    except ValueError:  # not the main thread: whoever runs us there handles signals
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interactive() -> bool:
    try:
        return sys.stderr.isatty()
    except (OSError, ValueError):
        return False


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if not issubclass(category, DeprecationWarning | FutureWarning):
        say(f"note: {message}")


def strict(value: Any) -> Any:
    """A value that strict JSON can hold: numbers that are not finite become None."""
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, Mapping):
        return {key: strict(item) for key, item in value.items()}
    return [strict(item) for item in value] if isinstance(value, list | tuple) else value

"""How a command ends: exit codes, errors as one sentence on stderr, and signals that stop it in good order."""

import contextlib
import io
import json
import logging
import os
import shlex
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import typer
import typer.core

from leangrid.errors import LeangridError
from leangrid.report.strict_json import strict

BUG, BAD_INPUT, STOPPED = 1, 2, 3
_PACKAGE = Path(__file__).resolve().parents[1]
# Environment variables that the libraries read when they are imported.
_BARS = ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")
_VERBOSITIES = ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY", "DATASETS_VERBOSITY")
_USAGE: Any = typer.BadParameter.__mro__[1]  # click's UsageError: typer has a click of its own


class _Stop(BaseException):
    """A signal arrived. It is a BaseException, so that no ``except Exception`` of the code that it stops catches it."""


@contextlib.contextmanager
def outcome(
    quiet: bool = False, resumable: bool = False, debug: bool = False, finished: str = "finished blocks"
) -> Iterator[None]:
    """Run the body of a command: LeangridError, signals and bugs become messages on stderr, and typer.Exit with their
    exit code.

    Args:
        quiet: print nothing but errors on stderr.
        resumable: whether the same command goes on where it stopped; a stop then prints it.
        debug: print tracebacks for every error, not for bugs alone.
        finished: what is on disk when it goes on, in words.
    """
    with _libraries(quiet, debug), _signals():
        try:
            yield
        except typer.Exit:
            raise
        except (_Stop, KeyboardInterrupt) as stop:
            left = f"{finished} are kept" if resumable else "nothing was written"
            _fail(f"stopped{f' by {stop}' if str(stop) else ''}: {left}", STOPPED, debug, resume=True)
        except LeangridError as error:
            _fail(f"error: {error}", error.exit_code, debug, resume=error.exit_code == STOPPED)
        except OSError as error:
            place = f" ({error.filename})" if error.filename else ""
            _fail(
                f"error: {error.strerror or error}{place}", STOPPED if resumable else BAD_INPUT, debug, resume=resumable
            )
        except Exception:
            _fail(
                "error: this is a bug of leangrid; the lines above and the command belong in a report",
                BUG,
                True,
                resume=False,
            )


def emit(text: str, end: str = "\n") -> None:
    """Print a result on stdout. Where its reader has closed the pipe, nothing more is printed and the command ends as
    usual."""
    try:
        sys.stdout.write(text + end)
        sys.stdout.flush()
    except UnicodeEncodeError:
        encoding = sys.stdout.encoding or "ascii"
        sys.stdout.write(text.encode(encoding, "replace").decode(encoding) + end)
    except (BrokenPipeError, ValueError):
        sys.stdout = io.StringIO()  # Python flushes sys.stdout once more as it ends


def emit_json(value: Mapping[str, Any]) -> None:
    """Print one strict JSON object on one line; NaN and infinities become null."""
    emit(json.dumps(strict(value), allow_nan=False))


def say(text: str) -> None:
    """Print one line on stderr, if it is open."""
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
def _libraries(quiet: bool, debug: bool) -> Iterator[None]:
    """Hide what other libraries print on stderr, and with ``quiet`` our own notices; with ``debug`` hide nothing."""
    wanted: dict[str, str] = dict.fromkeys(_BARS, "1") if quiet or not _interactive() else {}
    wanted = wanted if debug else wanted | dict.fromkeys(_VERBOSITIES, "error")
    ours = wanted.keys() - os.environ.keys()  # a variable that the user set is left alone
    os.environ.update({name: wanted[name] for name in ours})
    before = logging.root.manager.disable
    if quiet:
        logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = partial(_show_warning, quiet, debug)
            yield
    finally:
        logging.disable(before)
        for name in ours:
            os.environ.pop(name, None)  # for programs that call the command as a function


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """The first SIGINT or SIGTERM stops the command in good order, the second ends the process at once."""
    numbers = (signal.SIGINT, signal.SIGTERM)

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        for other in numbers:
            signal.signal(other, signal.SIG_DFL)
        raise _Stop(signal.Signals(number).name)

    try:
        before = {number: signal.signal(number, stop) for number in numbers}
    except ValueError:  # not the main thread, which alone can handle signals
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


def _show_warning(
    quiet: bool, debug: bool, message: Warning | str, category: type[Warning], filename: str, *_: Any, **__: Any
) -> None:
    ours = Path(filename).is_relative_to(_PACKAGE) or "leangrid" in str(message)
    if not quiet and (ours or debug) and not issubclass(category, DeprecationWarning | FutureWarning):
        say(f"note: {message}")


class Command(typer.core.TyperCommand):
    """A command whose function gets the context that it asks for."""

    context_class = typer.Context  # click's own is passed otherwise, of another type


class Commands(typer.core.TyperGroup):
    """The group of all commands. Arguments that cannot be parsed are reported in one sentence, as other errors are."""

    context_class = typer.Context

    def main(self, *args: Any, **options: Any) -> Any:
        try:
            code = super().main(*args, **{**options, "standalone_mode": False})
        except _USAGE as error:
            usage: Any = error
            message = str(usage.format_message())
            if "\n" in message:  # the help, which is shown where no argument was given
                usage.show()
            else:
                command = usage.ctx.command_path if usage.ctx is not None else "leangrid"
                say(f"error: {message[:1].lower()}{message[1:].rstrip('.?')}. See: {command} --help")
            sys.exit(BAD_INPUT)
        sys.exit(code if isinstance(code, int) else 0)

"""Progress on stderr: a bar that redraws itself on a terminal, one line for each block anywhere else. Errors in writing
it do not stop a run."""

import sys
import time
from types import TracebackType
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from leangrid.progress import Event
from leangrid.report.units import format_duration, format_size

_BROKEN = (OSError, ValueError)  # a closed pipe, a closed file, an encoding without the character
_REDRAW_SECONDS = 0.2


class _Console(Console):
    """Raises an error where the reader is gone; rich would end the whole program."""

    def on_broken_pipe(self) -> NoReturn:
        raise BrokenPipeError


class Terminal:
    """Shows events: it is called with each, inside a ``with``, which removes the bar at its end.

    Args:
        stream: a text stream; stderr where None.
        quiet: whether nothing is shown.
        interactive: whether a bar is shown; None: if ``stream`` is a terminal.
    """

    def __init__(self, stream: Any = None, quiet: bool = False, interactive: bool | None = None) -> None:
        self.stream = sys.stderr if stream is None else stream
        self.quiet, self.alive = quiet, True
        self.interactive = _is_terminal(self.stream) if interactive is None else interactive
        self._bar: Progress | None = None
        self._last_line: tuple[str, int] | None = None
        self._drawn = 0.0

    def __call__(self, event: Event) -> None:
        if not self.alive:
            return
        try:
            self._show(event)
        except _BROKEN:
            self.alive, self._bar = False, None  # nobody reads any more; the run goes on

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        bar, self._bar = self._bar, None
        if bar is not None:
            try:
                bar.stop()
            except _BROKEN:
                self.alive = False

    def _show(self, event: Event) -> None:
        if self.quiet:
            return
        if event.message:
            self._print(event.message)
        if event.blocks <= 0 or event.stage == "notice":
            return
        if self.interactive:
            self._draw(event)
        elif event.stage in ("block", "window") and self._last_line != (event.layer, event.block):
            self._last_line = (event.layer, event.block)
            self._print(line(event))

    def _print(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
            return
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        self.stream.flush()

    def _draw(self, event: Event) -> None:
        if self._bar is None:
            console = _Console(file=self.stream, force_terminal=True)
            columns = (BarColumn(bar_width=20), TextColumn("{task.description}", markup=False))
            self._bar = Progress(
                *columns,
                auto_refresh=False,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
                console=console,
            )
            self._bar.add_task("", total=event.blocks)
            self._bar.start()
        finished = event.block + (event.stage == "block")
        self._bar.update(self._bar.task_ids[0], completed=finished, total=event.blocks, description=line(event))
        now = time.monotonic()
        if event.stage not in ("layer", "export") or not 0 <= now - self._drawn < _REDRAW_SECONDS:
            self._drawn = now
            self._bar.refresh()


def line(event: Event) -> str:
    """One event as a line: block 3/30, layer, loss, tokens/s, memory, time left; what is unknown is left out."""
    if event.stage == "window":
        return f"window {event.block}/{event.blocks}  {event.layer}"
    if event.stage == "export":
        return f"layer {event.block + 1}/{event.blocks}  {event.layer}"
    parts = [f"block {event.block + 1}/{event.blocks}"]
    if event.layer:
        parts.append(event.layer)
    if event.stage in ("layer", "block"):
        parts.append(f"loss {event.loss:.4g}")
    elif event.stage:
        parts.append(event.stage)
    if event.tokens_per_second > 0:
        parts.append(f"{event.tokens_per_second:,.0f} tokens/s")
    if event.memory_bytes > 0:
        parts.append(format_size(event.memory_bytes))
    if event.seconds_left >= 0:
        parts.append(f"{format_duration(event.seconds_left)} left")
    return "  ".join(parts)


def _is_terminal(stream: Any) -> bool:
    try:
        return stream.isatty()
    except _BROKEN:
        return False

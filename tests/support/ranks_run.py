"""The run that the tests of several ranks start, and what they look at of its result."""

import json
from pathlib import Path
from typing import Any

import forked_ranks
from forked_ranks import Ended, command
from tiny_run import digest

from leangrid.report.views import TIMED

TOLERANCE = 0.1  # of a layer's loss, one rank beside several: docs/distributed.md
KILLED = -9


def contents(out: Path) -> dict[str, str]:
    """The sha256 of each file of a result that holds no times."""
    return {name: sha256 for name, sha256 in digest(out).items() if name not in TIMED}


def words(source: Path | str, out: Path, *more: str) -> tuple[Any, ...]:
    """The command that all tests give."""
    text = out.parent / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 400)
    return ("quantize", source, out, "--calibration", text, "--samples", "4", "--length", "32", "--threads", "1", *more)


def together(
    source: Path, out: Path, count: int, *more: str, failing: dict[int, str] | None = None, within: float = 60
) -> list[Ended]:
    """That command on ``count`` ranks, some with a failpoint, in at most so many seconds."""
    return forked_ranks.run(count, command(*words(source, out, *more)), failing, within=within)


def sentences(said: str) -> list[str]:
    """What a rank said of its end, without progress."""
    return [line for line in said.splitlines() if line.startswith(("error", "stopped"))]


def records(out: Path) -> dict[str, dict[str, Any]]:
    """Name -> line of records.jsonl."""
    lines = (json.loads(line) for line in (out / "records.jsonl").read_text().splitlines())
    return {line["name"]: line for line in lines}


def losses(out: Path) -> dict[str, float]:
    """Name -> loss of every layer."""
    return {name: line["loss"] for name, line in records(out).items()}

"""Reads rows of data sets on the hub as a stream, with the package ``datasets``: C4, WikiText-2 and any other."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leangrid.data.files import Row
from leangrid.errors import CalibrationError

PREFIX = "hf:"
OFFLINE = "Without a network use self (samples of the model itself), embedded (for smoke tests), or a .txt/.jsonl file"
_SPELLING = "Write hf:org/name:split:column, or hf:org/name/config:split:column"
_NAME = re.compile(
    r"(?P<repository>[\w.-]+(/[\w.-]+)?)(/(?P<config>[\w.+-]+))?(@(?P<revision>[\w./-]+))?(:(?P<split>[^:]*)(:(?P<column>.+))?)?"
)
_SHUFFLED = 10_000  # size, in rows, of the buffer for shuffling


@dataclass(frozen=True)
class HubData:
    """The parts of a data set's name ``hf:org/name[/config][@revision][:split[:column]]``.

    None stands for the only config, the caller's split, the known columns and the newest revision. ``files``: split ->
    file of the repository, to read only that one."""

    repository: str
    config: str | None = None
    split: str | None = None
    column: str | None = None
    revision: str | None = None
    files: dict[str, str] | None = None

    @classmethod
    def parse(cls, name: str) -> "HubData":
        """Parse a name that begins with ``hf:``. CalibrationError, with the right form, if it has another one."""
        match = _NAME.fullmatch(name.removeprefix(PREFIX))
        if match is None:
            raise CalibrationError("not a data set of the hub", name, _SPELLING)
        if "[" in (match["split"] or ""):
            raise CalibrationError(
                "a data set that is streamed has no slices of a split",
                name,
                f"{_SPELLING}; --samples limits what is read",
            )
        return cls(match["repository"], match["config"], match["split"] or None, match["column"], match["revision"])

    @property
    def folder(self) -> Path | None:
        """The local directory of the same path, which ``datasets`` reads instead of the hub; None if there is none."""
        path = Path(self.repository)
        return path if path.is_dir() else None


def read_hub_rows(data: HubData, split: str, seed: int | None) -> Iterator[Row]:
    """Yield the rows of a data set.

    Args:
        split: the split to read if ``data`` names none.
        seed: shuffles the rows as they arrive; None keeps their order.

    Raises:
        CalibrationError: ``datasets`` is not installed, or the data set cannot be read; says what to use instead.
    """
    try:
        import datasets
    except ImportError as error:
        raise CalibrationError(
            "the package 'datasets' is not installed", data.repository, f"pip install datasets. {OFFLINE}"
        ) from error
    try:
        stream: Any = datasets.load_dataset(
            data.repository,
            data.config,
            data_files=data.files,
            split=data.split or split,
            revision=data.revision,
            streaming=True,
        )
        if seed is not None:
            stream = stream.shuffle(seed=seed, buffer_size=_SHUFFLED)
        rows = iter(stream)
    except Exception as error:  # hub, http, fsspec and pyarrow errors have no common base class
        raise _unreadable(error, data) from error
    number = 0
    while True:
        try:
            row = next(rows, None)
        except Exception as error:
            raise _unreadable(error, data) from error
        if row is None:
            return
        number += 1
        yield Row(f"{data.repository}, row {number}", dict(row))


def _unreadable(error: Exception, data: HubData) -> CalibrationError:
    said = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
    return CalibrationError(f"the corpus cannot be read from the hub: {said}", data.repository, OFFLINE)

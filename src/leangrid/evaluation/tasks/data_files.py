"""Reading the data of tasks: files of ``--tasks-dir``, datasets of the hub."""

import json
from pathlib import Path
from typing import Any

from leangrid.errors import TaskError, first_line


def read_bytes(path: Path) -> bytes:
    """A file's bytes; TaskError where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        what = f"the file cannot be read: {error.strerror}"
        raise TaskError(what, path, "Check the path and its permissions") from error


def read_text(path: Path) -> str:
    """A file's text, UTF-8; TaskError where it is not."""
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TaskError(f"not UTF-8 at byte {error.start}", path, "Convert the file: iconv -f OLD -t utf-8") from None


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """One JSON object a line, empty lines left out; TaskError with the line's number for anything else, and for no line
    at all."""
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):  # not splitlines: JSON may hold other separators
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TaskError(f"not JSON: {error}", f"{path}:{number}", "A line holds one JSON object") from None
        if not isinstance(row, dict):
            raise TaskError("not a JSON object", f"{path}:{number}", "A line holds one JSON object")
        rows.append(row)
    if not rows:
        raise TaskError("the file holds no documents", path, "A line holds one JSON object")
    return rows


def find_file(task: str, directory: Path, pattern: str) -> Path:
    """The one file of ``directory`` that ``pattern`` matches; TaskError where there is none, or more."""
    if not directory.is_dir():
        raise TaskError("there is no such directory", directory, f"Give one that holds {pattern}: --tasks-dir DIR")
    found = sorted(directory.glob(pattern))
    if len(found) != 1:
        names = ", ".join(path.name for path in found[:4])
        what = f"task {task} needs one file, {len(found)} are here: {names}"
        what = what if found else f"the data of task {task} are missing"
        raise TaskError(what, directory, f"Put one {pattern} there")
    return found[0]


def read_hub_rows(task: str, repository: str, split: str) -> list[dict[str, Any]]:
    """The rows of one split of a hub dataset; TaskError where it cannot be reached."""
    try:
        import datasets

        return list(datasets.load_dataset(repository, split=split))  # pyright: ignore[reportArgumentType, reportReturnType]
    except Exception as error:  # hub, http, fsspec and pyarrow errors have no common base class
        way_out = "Without a network give the file in a directory: --tasks-dir DIR"
        raise TaskError(f"the data of task {task} cannot be read: {first_line(error)}", repository, way_out) from error

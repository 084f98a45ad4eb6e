"""Documents of text: two public corpora streamed through ``datasets``, the prose that ships with Python, or the user's file."""

import ast
import json
import logging
import sysconfig
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from leangrid.errors import CalibrationError, first_line

log = logging.getLogger("leangrid")

NAMED = ("c4", "wikitext2", "self", "embedded")
_OFFLINE = "Without a network use self (samples of the model itself), embedded (for smoke tests), or a .txt/.jsonl file"
_PACKAGES = ("concurrent/futures", "email", "logging", "multiprocessing", "unittest")  # 1.2 million characters with the rest
_SHORTEST_DOCSTRING = 200  # characters: below it a docstring is a label, not prose


def texts(name: str, *, split: str = "train", seed: int | None = None) -> Iterator[str]:
    """The documents of a corpus, lazily.

    Args:
        name: "c4", "wikitext2", "embedded", or the path of a .txt (one document) or .jsonl file (one document a line).
        split: "train" to calibrate, "test" to evaluate (C4 has no test split: its validation files are used).
        seed: shuffles C4's documents as they stream (buffer of 10,000); None keeps their order. Other corpora keep
            their order here, and calibration chooses among their windows.

    Raises:
        CalibrationError: no such corpus or file, no network, not UTF-8, a JSON line without text.
    """
    if name == "embedded":
        log.warning("embedded text is Python's own documentation: for smoke tests, not for quality; use c4, self or a file near your use")
        return iter(_embedded())
    if name == "c4":
        return _c4(split, seed)
    if name == "wikitext2":
        return _hub("Salesforce/wikitext", "wikitext-2-raw-v1", split, None, None)
    path = Path(name)
    if not path.is_file():
        raise CalibrationError(f"'{name}' is neither a corpus nor a file", "text", f"Known: {', '.join(NAMED)}, or a .txt/.jsonl file")
    if path.suffix == ".jsonl":
        return _json_lines(path)
    return _plain(path)


def joined(name: str, *, split: str = "test", enough: int | None = None) -> str:
    """All documents as one string, joined by blank lines (Frantar et al. 2022). ``enough``: stop after so many characters."""
    parts: list[str] = []
    size = 0
    for document in texts(name, split=split):
        parts.append(document)
        size += len(document) + 2
        if enough is not None and size >= enough:
            break
    text = "\n\n".join(parts)
    if not text.strip():
        raise CalibrationError("the text is empty", name, "Give a file or corpus that holds text")
    return text


def _c4(split: str, seed: int | None) -> Iterator[str]:
    # One of 1,024 shards (356,000 documents) is plenty and spares the listing of the whole corpus.
    part = "train.00000-of-01024" if split == "train" else "validation.00000-of-00008"
    return _hub("allenai/c4", None, "train", {"train": f"en/c4-{part}.json.gz"}, seed)


def _hub(repository: str, config: str | None, split: str, files: dict[str, str] | None, seed: int | None) -> Iterator[str]:
    """Stream one text column of a hub dataset; every failure to reach it becomes one sentence with the way out."""
    try:
        import datasets

        stream: Any = datasets.load_dataset(repository, config, data_files=files, split=split, streaming=True)
        if seed is not None:
            stream = stream.shuffle(seed=seed, buffer_size=10_000)
        for row in stream:
            yield row["text"]
    except GeneratorExit:
        raise
    except ImportError as error:
        raise CalibrationError("the package 'datasets' is not installed", repository, f"pip install datasets. {_OFFLINE}") from error
    except Exception as error:  # hub, http, fsspec and pyarrow errors have no common base class
        raise CalibrationError(f"the corpus cannot be read: {first_line(error)}", repository, _OFFLINE) from error


def _plain(path: Path) -> Iterator[str]:
    yield _decode(_bytes(path), path)


def _json_lines(path: Path) -> Iterator[str]:
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _document(_decode(line, f"{path}:{number}"), f"{path}:{number}")
    except OSError as error:
        raise CalibrationError(f"the file cannot be read: {error.strerror}", path, "Check the path and its permissions") from error


def _document(line: str, where: str) -> str:
    """The text of one JSON line: its ``text``, else ``prefix`` + ``gold_completion``, else its first string."""
    way_out = 'A line holds a JSON object such as {"text": "..."}'
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise CalibrationError(f"not JSON: {error}", where, way_out) from None
    if isinstance(row, str):
        return row
    if isinstance(row, dict):
        if isinstance(row.get("text"), str):
            return row["text"]
        if isinstance(row.get("prefix"), str) and isinstance(row.get("gold_completion"), str):
            return row["prefix"] + row["gold_completion"]
        for value in row.values():
            if isinstance(value, str):
                return value
    raise CalibrationError("no text in this line", where, way_out)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CalibrationError(f"the file cannot be read: {error.strerror}", path, "Check the path and its permissions") from error


def _decode(data: bytes, where: object) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"not UTF-8 at byte {error.start}", where, "Convert the file: iconv -f OLD -t utf-8") from None


@cache
def _embedded() -> tuple[str, ...]:
    """Python's language reference topics, then the long docstrings of the standard library, in the order of their names.

    The same for every run of one Python version. Sources are parsed, never imported.
    """
    try:
        reference = import_module("pydoc_data.topics").topics
    except ImportError:  # some distributions leave it out
        reference = {}
    documents = [reference[name].strip() for name in sorted(reference)]
    library = Path(sysconfig.get_paths()["stdlib"])
    for folder in ("", *_PACKAGES):
        for path in sorted((library / folder).glob("*.py")):
            documents += _docstrings(path)
    return tuple(documents)


def _docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return  # not prose we can use, and other files follow
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text is not None and len(text) >= _SHORTEST_DOCSTRING:
                yield text.strip()

"""Documents of text by the name that a user gives: public corpora and data sets of the hub, the prose that ships with
Python, or a file."""

import ast
import logging
import os
import sysconfig
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from leangrid.data.chat import Chat
from leangrid.data.documents import Document, Reading, joined_text
from leangrid.data.documents import documents as of_rows
from leangrid.data.files import KNOWN, check_file, rows
from leangrid.data.hub import PREFIX, HubData, hub_rows
from leangrid.errors import CalibrationError

log = logging.getLogger("leangrid")

NAMED = ("c4", "wikitext2", "self", "embedded")
_WIKITEXT = HubData("Salesforce/wikitext", "wikitext-2-raw-v1")
_PACKAGES = (
    "concurrent/futures",
    "email",
    "logging",
    "multiprocessing",
    "unittest",
)  # 1.2 million characters with the rest
_SHORTEST_DOCSTRING = 200  # characters: below it a docstring is a label, not prose


def documents(
    name: str,
    *,
    split: str = "train",
    seed: int | None = None,
    column: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    reading: Reading | None = None,
) -> Iterator[Document]:
    """The documents of a corpus with what stands between them, lazily.

    Args:
        name: "c4", "wikitext2", "embedded", a data set of the hub
            (``hf:org/name[/config][@revision][:split[:column]]``), or the path of a file: plain text (one document),
            JSON, JSON Lines, CSV, TSV, Parquet or Arrow (a document a row), also compressed.
        split: "train" to calibrate, "test" to evaluate, where the name holds none (C4 has no test split: its validation
        files are used).
        seed: shuffles the documents of C4 and of the hub's data sets as they stream (buffer of 10,000); None keeps
            their order. Other corpora keep their order here, and calibration chooses among their windows.
        column: of a file's rows, the one to use; None: ``text``, or conversations and pairs by the usual names
        (data/conversations.py).
        tokenizer: whose chat template conversations go through; None: plain lines.
        reading: grows with what is read and what is left out.

    Raises:
        CalibrationError: no such corpus or file, no network, not UTF-8, rows without text; a column for a corpus that
        has but one.
    """
    account, chat = Reading(name) if reading is None else reading, Chat(tokenizer)
    if name in NAMED:
        if column is not None:
            raise CalibrationError(
                f"'{name}' has no columns to choose from", "--text-field", "Give it with a file or hf:org/name"
            )
        return _named(name, split, seed)
    if name.startswith(PREFIX):
        data = HubData.parse(name)
        if column is not None and data.column not in (None, column):
            raise CalibrationError(
                f"two columns are asked for, {data.column} and {column}", name, "Leave out --text-field"
            )
        if data.folder is not None:
            account.notes.append(f"read from the folder {data.folder} here, not from the hub")
        return of_rows(hub_rows(data, split, seed), column or data.column, chat, account)
    path = Path(name)
    if not os.path.lexists(name):  # unlike Path.exists it takes any string
        shown = name if len(name) <= 100 else f"{name[:100]}..."
        hub = f"; a data set of the hub is written {PREFIX}{name}" if name.count("/") == 1 and not path.suffix else ""
        what = f"'{' '.join(shown.split())}' is neither a corpus nor a file"
        raise CalibrationError(what, "text", f"Known: {', '.join(NAMED)}, or a {KNOWN}{hub}")
    check_file(path)
    return of_rows(rows(path), column, chat, account)


def check(name: str, column: str | None = None) -> None:
    """CalibrationError for an unknown name, or a file whose first rows hold no text; needs neither model nor
    network."""
    if name in NAMED and column is None:
        return
    found = documents(name, column=column)
    if file_of(name) is not None:
        next(found, None)


def file_of(name: str) -> Path | None:
    """The file that ``documents`` reads for ``name``; None where that is a corpus, or nothing."""
    return None if name in NAMED or name.startswith(PREFIX) or not os.path.isfile(name) else Path(name)


def texts(
    name: str,
    *,
    split: str = "train",
    seed: int | None = None,
    column: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    reading: Reading | None = None,
) -> Iterator[str]:
    """The texts of ``documents`` alone; its arguments and errors."""
    found = documents(name, split=split, seed=seed, column=column, tokenizer=tokenizer, reading=reading)
    return (document.text for document in found)


def joined(
    name: str,
    *,
    split: str = "test",
    enough: int | None = None,
    column: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    reading: Reading | None = None,
) -> str:
    """All documents as one string, joined by blank lines (Frantar et al. 2022), conversations by what their template
    ends them with.

    ``enough``: stop after so many characters. The other arguments, and errors: see ``documents``.
    """
    found: list[Document] = []
    size = 0
    for document in documents(name, split=split, column=column, tokenizer=tokenizer, reading=reading):
        found.append(document)
        size += len(document.text) + len(document.gap)
        if enough is not None and size >= enough:
            break
    text = joined_text(found)
    if not text.strip():
        raise CalibrationError("the text is empty: it holds no text", name, "Give a file or corpus that holds text")
    return text


def _named(name: str, split: str, seed: int | None) -> Iterator[Document]:
    """Of the corpora that have a name: as they are, blank documents too, so that windows are those of other tools."""
    if name == "embedded":
        log.warning(
            "embedded text is Python's own documentation: for smoke tests, not for quality; use c4, self or a file near your use"
        )
        return map(Document, _embedded())
    if name == "self":
        raise CalibrationError("text of the model itself is drawn, not read", name, "Give another corpus, or a file")
    if name == "wikitext2":
        return (Document(row.value["text"]) for row in hub_rows(_WIKITEXT, split, None))
    # One of 1,024 shards (356,000 documents) is plenty and spares the listing of the whole corpus.
    part = "train.00000-of-01024" if split == "train" else "validation.00000-of-00008"
    data = HubData("allenai/c4", files={"train": f"en/c4-{part}.json.gz"})
    return (Document(row.value["text"]) for row in hub_rows(data, "train", seed))


@cache
def _embedded() -> tuple[str, ...]:
    """Python's language reference topics, then the long docstrings of the standard library, in the order of their
    names.

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

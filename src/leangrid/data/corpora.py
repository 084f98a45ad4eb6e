"""Finds the text that a name stands for: a public corpus, a data set of the hub, Python's own prose, or a file."""

import ast
import logging
import os
import sysconfig
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from itertools import islice
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from leangrid.data.chat import Chat
from leangrid.data.documents import Document, Reading, documents_of_rows, join_documents
from leangrid.data.files import KNOWN, Row, check_file, read_rows
from leangrid.data.hub import PREFIX, HubData, read_hub_rows
from leangrid.data.picture_rows import first_rows_have, has_picture_column, shows_pictures
from leangrid.errors import CalibrationError

log = logging.getLogger("leangrid")

NAMED = ("c4", "wikitext2", "self", "embedded")
_WIKITEXT = HubData("Salesforce/wikitext", "wikitext-2-raw-v1")
# Packages of the standard library with long docstrings; with the modules at the top, 1.2 million characters.
_PACKAGES = ("concurrent/futures", "email", "logging", "multiprocessing", "unittest")
_SHORTEST_DOCSTRING = 200  # characters; shorter ones are labels, not prose


def read_documents(
    name: str,
    *,
    split: str = "train",
    seed: int | None = None,
    column: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    reading: Reading | None = None,
) -> Iterator[Document]:
    """The documents of a corpus, read one after the other.

    Args:
        name: "c4", "wikitext2", "embedded", a data set of the hub
            (``hf:org/name[/config][@revision][:split[:column]]``), or the path of a file: plain text (one document),
            JSON, JSON Lines, CSV, TSV, Parquet or Arrow (one document for each row), also compressed.
        split: "train" to calibrate, "test" to evaluate, unless the name has one. C4 has no test split: its validation
            files are used.
        seed: shuffles the documents of C4 and of the hub's data sets as they arrive (buffer of 10,000); None keeps
            their order. Other corpora keep their order in any case.
        column: the column of the rows to use; None: ``text``, or conversations and pairs under the usual names
            (data/conversations.py).
        tokenizer: the tokenizer whose chat template conversations go through; None: plain lines.
        reading: counts what is read and what is left out; None: it is not needed.

    Raises:
        CalibrationError: there is no such corpus or file, no network, text that is not UTF-8, no row with text, or a
            column for a corpus without columns.
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
        return documents_of_rows(read_hub_rows(data, split, seed), column or data.column, chat, account)
    path = Path(name)
    if not os.path.lexists(name):  # unlike Path.exists it takes any string
        shown = name if len(name) <= 100 else f"{name[:100]}..."
        hub = f"; a data set of the hub is written {PREFIX}{name}" if name.count("/") == 1 and not path.suffix else ""
        what = f"'{' '.join(shown.split())}' is neither a corpus nor a file"
        raise CalibrationError(what, "text", f"Known: {', '.join(NAMED)}, or a {KNOWN}{hub}")
    check_file(path)
    return documents_of_rows(read_rows(path), column, chat, account)


def find_pictures_in(
    name: str, *, takes_pictures: bool, split: str = "train", seed: int | None = None, column: str | None = None
) -> Iterator[Row] | None:
    """The rows of a corpus of which the first ones have pictures; None where they have none.

    Args:
        takes_pictures: whether the model does.
        split, seed, column: as for ``read_documents``.

    Raises:
        CalibrationError: the model takes no pictures, and a file has a column of them; unless ``column`` names that of
            the text.
    """
    if name in NAMED or (not name.startswith(PREFIX) and find_corpus_file(name) is None):
        return None
    if name.startswith(PREFIX):
        data = HubData.parse(name)
        one = islice(read_hub_rows(data, split, seed), 1) if takes_pictures else ()  # its rows all have one layout
        return read_hub_rows(data, split, seed) if first_rows_have(shows_pictures, one) else None
    if takes_pictures:
        return read_rows(Path(name)) if first_rows_have(shows_pictures, read_rows(Path(name))) else None
    if column is None and first_rows_have(has_picture_column, read_rows(Path(name))):
        what = "its rows have pictures, and this model takes text alone"
        raise CalibrationError(what, name, "Leave out the column, or name that of the text: --text-field NAME")
    return None


def check_corpus(name: str, column: str | None = None) -> None:
    """Raise CalibrationError for an unknown name, or a file without text in its first rows.

    Neither a model nor the network is used; the arguments are those of ``read_documents``."""
    if name in NAMED and column is None:
        return
    found = read_documents(name, column=column)
    if find_corpus_file(name) is not None:
        next(found, None)


def find_corpus_file(name: str) -> Path | None:
    """The file that ``read_documents`` reads for ``name``; None if it is a corpus, or there is no such file."""
    return None if name in NAMED or name.startswith(PREFIX) or not os.path.isfile(name) else Path(name)


def read_joined_text(
    name: str,
    *,
    split: str = "test",
    enough: int | None = None,
    column: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    reading: Reading | None = None,
) -> str:
    """All documents of a corpus as one string, joined by blank lines as in Frantar et al. (2022).

    Conversations whose template ends them follow each other without a blank line. ``enough``: stop after a document
    with which there are so many characters; None: read all. Other arguments and errors: see ``read_documents``."""
    found: list[Document] = []
    size = 0
    for document in read_documents(name, split=split, column=column, tokenizer=tokenizer, reading=reading):
        found.append(document)
        size += len(document.text) + len(document.gap)
        if enough is not None and size >= enough:
            break
    text = join_documents(found)
    if not text.strip():
        raise CalibrationError("the text is empty: it holds no text", name, "Give a file or corpus that holds text")
    return text


def _named(name: str, split: str, seed: int | None) -> Iterator[Document]:
    """The documents of a named corpus. Blank ones are kept, so that windows are the same as in other tools."""
    if name == "embedded":
        log.warning(
            "embedded text is Python's own documentation: for smoke tests, not for quality; "
            "use c4, self or a file near your use"
        )
        return map(Document, _embedded())
    if name == "self":
        raise CalibrationError("text of the model itself is drawn, not read", name, "Give another corpus, or a file")
    if name == "wikitext2":
        return (Document(row.value["text"]) for row in read_hub_rows(_WIKITEXT, split, None))
    # One of 1,024 shards (356,000 documents) is enough, and avoids listing the whole corpus.
    part = "train.00000-of-01024" if split == "train" else "validation.00000-of-00008"
    data = HubData("allenai/c4", files={"train": f"en/c4-{part}.json.gz"})
    return (Document(row.value["text"]) for row in read_hub_rows(data, "train", seed))


@cache
def _embedded() -> tuple[str, ...]:
    """The topics of Python's language reference, then the long docstrings of the standard library, by name.

    They are the same in every run of one Python version. Sources are parsed, never imported."""
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
    """Yield the long docstrings of a Python file; nothing if it cannot be parsed."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text is not None and len(text) >= _SHORTEST_DOCSTRING:
                yield text.strip()

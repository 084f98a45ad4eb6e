"""Reads the rows of text files: JSON, JSON Lines, CSV, TSV, Parquet, Arrow and plain text, compressed or not.

The first bytes of a file show its compression, the end of its name (in any letter case) its format. Only JSON
documents and compressed Parquet or Arrow files are read into memory completely."""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple

from leangrid.errors import CalibrationError, first_line
from leangrid.storage.foreign import is_pointer

_COMPRESSED = (".gz", ".gzip", ".zst", ".zstd", ".bz2", ".xz")
_FORMATS = {
    ".json": "json", ".jsonl": "lines", ".ndjson": "lines", ".jl": "lines", ".csv": "csv", ".tsv": "tsv", ".tab": "tsv",
    ".parquet": "parquet", ".pq": "parquet", ".arrow": "arrow", ".feather": "arrow",
}  # fmt: skip
_NO_TEXT = {
    b"PK\x03\x04": "a zip archive or office document",
    b"%PDF": "a PDF",
    b"SQLite format 3": "a database",
    b"GGUF": "a GGUF model",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
}
_UNICODE = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_LISTS = ("data", "rows", "train", "examples", "instances", "items", "documents", "conversations", "samples")
_JSON_ROW = re.compile(rb'\s*(\[\s*)?\{\s*"[^"\n]*"\s*:')
_OPENS_A_DOCUMENT = re.compile(r'\s*(\[\s*$|\{\s*$|\[\s*[{"])')
_KINDS = {str: "one string", int: "a number", float: "a number", bool: "a truth value"}
_PIECE = 1 << 22  # bytes of plain text in one row
_ENDED = re.compile(rb"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")  # a line with its end, or the last one without
_HEAD = 4096
_BATCH = 256  # rows of a Parquet file in memory at once
KNOWN = ".txt, .json, .jsonl, .csv, .tsv or .parquet file (also .gz, .zst)"
_DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError, csv.Error)


class Row(NamedTuple):
    """One row of a file.

    ``where``: its place, for messages. ``value``: a dict by column, a list, or a text. ``ends``: False for a piece of a
    plain text that continues in the next row."""

    where: str
    value: Any
    ends: bool = True


def check_file(path: Path) -> None:
    """Raise CalibrationError if there is no regular file at ``path``, saying what there is instead."""
    if path.is_dir():
        inside = sorted(
            entry.name for entry in path.iterdir() if entry.suffix.lower() in (*_FORMATS, *_COMPRESSED, ".txt")
        )
        way_out = f"Give one file of it, such as {path / inside[0]}" if inside else f"Give a {KNOWN}"
        raise CalibrationError("it is a directory, and text comes from one file", path, way_out)
    if path.exists() and not path.is_file():
        raise CalibrationError("not a regular file, and text is read more than once", path, f"Save it as a {KNOWN}")
    if not path.is_file():
        raise CalibrationError("no such file", path, f"Give a {KNOWN}")


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a file. A plain text is one row, or one for each 4 MiB of a larger one.

    Raises:
        CalibrationError: it is no regular file, a Git LFS pointer, binary, damaged, or in another encoding than UTF-8
            (UTF-16 and UTF-32 need a byte order mark). The message names the line or row if there is one.
    """
    check_file(path)
    try:
        with path.open("rb") as file:
            yield from _rows(file, path)
    except _DAMAGED as error:
        what = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        raise CalibrationError(
            f"the file cannot be read: {what}", path, "Check that it is complete and readable"
        ) from error


def _rows(file: IO[bytes], path: Path) -> Iterator[Row]:
    stream = _decompressed(file)
    head = _peek(stream)
    kind = _format(path, head)
    if is_pointer(head):
        raise CalibrationError("a Git LFS pointer, not the file itself", path, "Fetch the file: git lfs pull")
    if kind in ("parquet", "arrow"):
        return _columnar(stream, head, kind, path)
    return _textual(stream, head, kind, path)


def _textual(stream: io.BufferedReader, head: bytes, kind: str, path: Path) -> Iterator[Row]:
    encoding = next((name for mark, name in _UNICODE if head.startswith(mark)), "utf-8-sig")
    named = next((name for magic, name in _NO_TEXT.items() if head.startswith(magic)), None)
    if head[257:262] == b"ustar":
        named = "a tar archive"
    if path.suffix.lower() not in (".html", ".htm") and head.lstrip()[:14].lower().startswith(
        (b"<!doctype html", b"<html")
    ):
        named = "a web page"  # as a failed download leaves it
    if named is None and encoding == "utf-8-sig" and b"\0" in head:
        named = "binary, or UTF-16 without its mark"
    if named is not None:
        raise CalibrationError(f"the file is {named}, not text", path, f"Give a {KNOWN}, in UTF-8")
    if kind == "text" and _JSON_ROW.match(head.removeprefix(codecs.BOM_UTF8)):
        kind = "json"  # also if its name says otherwise: as plain text it would be braces and column names
    if kind == "text":
        return _plain(stream, encoding, path)
    lines = _lines(stream, encoding, path)
    return _separated(lines, kind, path) if kind in ("csv", "tsv") else _json(lines, kind, path)


def _decompressed(file: IO[bytes]) -> io.BufferedReader:
    """The decompressed bytes of a file; its first bytes show the compression, if any."""
    stream: Any = file
    head = _peek(stream)
    if head.startswith(b"\x1f\x8b"):
        return io.BufferedReader(gzip.GzipFile(fileobj=file))  # pyright: ignore[reportArgumentType]
    if head.startswith(b"BZh"):
        return io.BufferedReader(bz2.BZ2File(file))  # pyright: ignore[reportArgumentType]
    if head.startswith(b"\xfd7zXZ\0"):
        return io.BufferedReader(lzma.LZMAFile(file))  # pyright: ignore[reportArgumentType]
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd"))
    return stream


def _peek(stream: io.BufferedReader) -> bytes:
    return stream.peek(_HEAD)[:_HEAD]


def _format(path: Path, head: bytes) -> str:
    """The format: json, lines, csv, tsv, parquet, arrow or text. The name decides, unless the first bytes are clear."""
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith(b"ARROW1"):
        return "arrow"
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return _FORMATS.get(suffixes[-1], "text") if suffixes else "text"


def _lines(stream: io.BufferedReader, encoding: str, path: Path) -> Iterator[str]:
    """Yield the lines with their line ends, decoded one by one, so that an error names the line."""
    if encoding != "utf-8-sig":
        yield from io.StringIO(_decode(stream.read(), encoding, path), newline="")
        return
    number = 0
    for piece in stream:
        for line in _ENDED.findall(piece) if b"\r" in piece[:-2] else (piece,):  # \r alone ends lines of old Macs
            number += 1
            yield _decode(line, "utf-8-sig" if number == 1 else "utf-8", f"{path}:{number}")


def _plain(stream: io.BufferedReader, encoding: str, path: Path) -> Iterator[Row]:
    """Yield a plain text as one row, or as several pieces."""
    decoder, done = codecs.getincrementaldecoder(encoding)(), 0
    data = stream.read(_PIECE)
    while True:
        following = stream.read(_PIECE) if len(data) == _PIECE else b""
        held = len(decoder.getstate()[0])
        try:
            text = decoder.decode(data, final=not following)
        except UnicodeDecodeError as error:
            raise _encoding(encoding, done - held + error.start, path) from None
        yield Row(str(path), text, ends=not following)
        done += len(data)
        if not following:
            return
        data = following


def _decode(data: bytes, encoding: str, where: object) -> str:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise _encoding(encoding, error.start, where) from None


def _encoding(encoding: str, place: int, where: object) -> CalibrationError:
    name = encoding.upper().removesuffix("-SIG")
    return CalibrationError(f"not {name} at byte {place}", where, "Convert the file: iconv -f OLD -t utf-8")


# JSON and JSON Lines


def _json(lines: Iterator[str], kind: str, path: Path) -> Iterator[Row]:
    """Yield the rows of JSON Lines or of one JSON document; the first line shows which, whatever the name says."""
    numbered = ((number, line) for number, line in enumerate(lines, 1) if line.strip())
    first = next(numbered, None)
    if first is None:
        return
    try:
        value, alone = json.loads(first[1]), True
    except (ValueError, RecursionError):
        value, alone = None, False
    if not alone and (kind == "json" or _OPENS_A_DOCUMENT.match(first[1])):
        yield from _of_document(_parsed(first[1] + "".join(lines), path), path)
        return
    second = next(numbered, None)
    if alone and second is None and (kind == "json" or isinstance(value, list)):
        yield from _of_document(value, path)
        return
    for number, line in chain([first], [second] if second else [], numbered):
        yield Row(f"{path}:{number}", _parsed(line, f"{path}:{number}"))


def _of_document(value: Any, path: Path) -> Iterator[Row]:
    found = find_table(value)
    if found is None:
        raise CalibrationError(
            f"the JSON is {_KINDS.get(type(value), 'empty')}, not a list of rows", path, 'Give [{"text": "..."}, ...]'
        )
    for index, row in enumerate(found, 1):
        yield Row(f"{path}, row {index}", row)


def find_table(value: Any) -> Iterable[Any] | None:
    """The rows of a JSON document; None if it has none.

    It may be a list; an object with a list under a usual key, or under its only key with a list; an object with a list
    for each column; rows or columns by their index (pandas); or one object that is a row."""
    if isinstance(value, list):
        return [value] if _is_conversation(value) else value
    if not isinstance(value, dict) or not value:
        return None
    inner = list(value.values())
    lists = {name: entry for name, entry in value.items() if isinstance(entry, list)}
    objects = [name for name in _LISTS if isinstance(next(iter(lists.get(name, ())), None), dict)]
    if all(isinstance(entry, dict) for entry in inner) and len({tuple(entry) for entry in inner}) == 1:
        if not all(str(index).isdigit() for index in inner[0]):
            return inner
        return _transposed({name: list(column.values()) for name, column in value.items()})  # pandas' to_json
    if not objects and len(lists) == len(value) > 1 and len({len(entry) for entry in inner}) == 1:
        return _transposed(lists)
    named = objects or [name for name in _LISTS if name in lists] or (list(lists) if len(lists) == 1 else [])
    if named and not _is_conversation(lists[named[0]]):
        return [
            row["row"] if isinstance(row, dict) and "row_idx" in row and "row" in row else row
            for row in lists[named[0]]
        ]
    return [value]


def _transposed(columns: dict[str, list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _is_conversation(entries: list[Any]) -> bool:
    """Whether a list is the messages of one conversation, so that the object around it is one row."""
    named = ({"role", "content"}, {"from", "value"})
    return bool(entries) and all(
        isinstance(entry, dict) and any(keys <= set(entry) for keys in named) for entry in entries
    )


def _parsed(text: str, where: object) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise CalibrationError(
            f"not JSON: {first_line(error)}", where, 'A row is a JSON object such as {"text": "..."}'
        ) from None


# CSV and TSV


def _separated(lines: Iterator[str], kind: str, path: Path) -> Iterator[Row]:
    """Yield rows with the column names of the first line. A row with more or fewer cells is an error: its text may be
    cut."""
    header = next((line for line in lines if line.strip()), "")
    if not header:
        return
    separator = (
        "\t" if kind == "tsv" else max(",;\t|", key=lambda mark: (_outside_quotes(header).count(mark), mark == ","))
    )
    csv.field_size_limit(sys.maxsize)  # its default of 131,072 characters is shorter than documents are
    reader = csv.reader(chain([header], lines), delimiter=separator, strict=True)
    names: list[str] = []
    place = 1
    try:
        for cells in reader:
            where, place = f"{path}, row {place}", place + 1
            if not names:
                names = [name.strip() for name in cells]
            elif cells:
                if len(cells) != len(names):
                    what = f"{len(cells)} cells where the first row names {len(names)} columns"
                    raise CalibrationError(what, where, f'Put cells that hold "{separator}" or a line end in quotes')
                yield Row(where, dict(zip(names, cells, strict=True)))
    except csv.Error as error:
        raise CalibrationError(
            f"not {kind.upper()}: {error}", f"{path}, row {place}", 'Put texts in quotes, and write " as ""'
        ) from None


def _outside_quotes(line: str) -> str:
    return "".join(line.split('"')[::2])


# Parquet and Arrow


def _columnar(stream: io.BufferedReader, head: bytes, kind: str, path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.ipc
    import pyarrow.parquet

    # Both formats are read from several places, which a compressed stream does not allow.
    source: Any = stream if isinstance(stream.raw, io.FileIO) else io.BytesIO(stream.read())
    try:
        if kind == "parquet":
            batches = pyarrow.parquet.ParquetFile(source).iter_batches(_BATCH)
        elif head.startswith(b"ARROW1"):
            reader = pyarrow.ipc.open_file(source)
            batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
        else:
            batches = iter(pyarrow.ipc.open_stream(source))
        place = 1
        for batch in batches:
            for row in batch.to_pylist():
                yield Row(f"{path}, row {place}", row)
                place += 1
    except pyarrow.ArrowException as error:
        raise CalibrationError(
            f"no {kind.capitalize()} file: {first_line(error)}", path, "Check that it is complete"
        ) from None

"""data/files.py: every format gives the same rows, in any letter case and compression; other files are refused."""

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from leangrid.data.files import read_rows
from leangrid.errors import CalibrationError

ROWS = [{"id": "1", "text": 'the river, "small" and; bright'}, {"id": "2", "text": "stone\nlight café"}]


def separated(delimiter: str) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["id", "text"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue().encode()


def columnar(form: str) -> bytes:
    buffer, table = io.BytesIO(), pyarrow.Table.from_pylist(ROWS)
    if form == "parquet":
        pyarrow.parquet.write_table(table, buffer)
    else:
        make = pyarrow.ipc.new_file if form == "file" else pyarrow.ipc.new_stream
        with make(buffer, table.schema) as writer:
            writer.write(table)
    return buffer.getvalue()


LINES = "\n".join(map(json.dumps, ROWS)).encode()
BY_COLUMN = {"id": ["1", "2"], "text": [row["text"] for row in ROWS]}
FILES = {
    "a.jsonl": LINES,
    "lines.json": LINES,
    "array.jsonl": json.dumps(ROWS).encode(),
    "a.ndjson": b"\n\n" + LINES.replace(b"\n", b"\n\n") + b"\n",
    "bom.jsonl": b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n"),
    "utf16.jsonl": LINES.decode().encode("utf-16"),
    "array.json": json.dumps(ROWS).encode(),
    "indented.json": json.dumps(ROWS, indent=1).encode(),
    "data.json": json.dumps({"version": 1, "data": ROWS}).encode(),
    "other.json": json.dumps({"version": 1, "entries": ROWS}).encode(),
    "columns.json": json.dumps(BY_COLUMN).encode(),
    "pandas.json": json.dumps({name: dict(enumerate(column)) for name, column in BY_COLUMN.items()}).encode(),
    "viewer.json": json.dumps({"features": [1, 2], "rows": [{"row_idx": 0, "row": row} for row in ROWS]}).encode(),
    "json_called.txt": LINES,
    "json_without_a_suffix": json.dumps(ROWS).encode(),
    "a.csv": separated(","),
    "semicolons.csv": separated(";"),
    "bom.csv": b"\xef\xbb\xbf" + separated(","),
    "a.tsv": separated("\t"),
    "a.parquet": columnar("parquet"),
    "parquet_called.bin": columnar("parquet"),
    "stream.arrow": columnar("stream"),
    "file.feather": columnar("file"),
}
PACKED: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pyarrow.Codec("zstd").compress(data, asbytes=True),
    "": gzip.compress,  # and no suffix that says so
}


def found(folder: Path, name: str, data: bytes) -> list[object]:
    (folder / name).write_bytes(data)
    return [row.value for row in read_rows(folder / name)]


@pytest.mark.parametrize("name", FILES)
def test_a_format_gives_its_rows(name: str, tmp_path: Path) -> None:
    assert found(tmp_path, name, FILES[name]) == ROWS
    assert found(tmp_path, name.upper(), FILES[name]) == ROWS


@pytest.mark.parametrize("suffix", PACKED)
@pytest.mark.parametrize("name", ["a.jsonl", "array.json", "a.csv", "a.parquet", "file.feather"])
def test_a_compressed_file_gives_its_rows(name: str, suffix: str, tmp_path: Path) -> None:
    packed = PACKED[suffix](FILES[name])
    assert found(tmp_path, name + suffix, packed) == ROWS
    assert found(tmp_path, (name + suffix).upper(), packed) == ROWS


def test_a_name_that_promises_compression_and_has_none(tmp_path: Path) -> None:
    assert found(tmp_path, "a.jsonl.gz", LINES) == ROWS


@pytest.mark.parametrize("name", ["a.txt", "A.TXT", "wiki.test.raw", "a.md", "plain"])
@pytest.mark.parametrize("text", ["one\n\n{two} é\r\n", "  = Title =\n", "[1] a footnote\n"])
def test_a_plain_text_is_one_row(name: str, text: str, tmp_path: Path) -> None:
    assert found(tmp_path, name, text.encode()) == [text]
    assert found(tmp_path, name, b"\xef\xbb\xbf" + text.encode()) == [text]
    assert found(tmp_path, name, text.encode("utf-16")) == [text]
    assert found(tmp_path, f"{name}.gz", gzip.compress(text.encode())) == [text]


def test_a_large_text_comes_in_pieces_that_part_no_character(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leangrid.data.files._PIECE", 7)
    text = "é→雪 words " * 10
    (tmp_path / "a.txt").write_text(text)
    pieces = list(read_rows(tmp_path / "a.txt"))
    assert "".join(piece.value for piece in pieces) == text and len(pieces) > 10
    assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    with pytest.raises(CalibrationError, match="not UTF-8 at byte 20 "):
        found(tmp_path, "bad.txt", b"0123456789" * 2 + b"\xff" + b"0123456789")


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.jsonl.gz", "a.txt"])
def test_a_large_file_is_not_read_whole(name: str, tmp_path: Path) -> None:
    line = "x" * 1000
    text = "".join(f'"{line}"\n' for _ in range(60_000))
    data = (f"text\n{text}" if "csv" in name else text).encode()
    (tmp_path / name).write_bytes(gzip.compress(data, 1) if name.endswith("gz") else data)
    tracemalloc.start()
    try:
        assert len(list(itertools.islice(read_rows(tmp_path / name), 2))) == 2
        assert tracemalloc.get_traced_memory()[1] < 0.9 * len(data)
    finally:
        tracemalloc.stop()


def test_a_parquet_file_is_read_by_batches(tmp_path: Path) -> None:
    table = pyarrow.table({"text": [f"row {index}" for index in range(3000)]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=500)
    assert [row.value["text"] for row in read_rows(tmp_path / "a.parquet")] == table["text"].to_pylist()


def test_line_ends_of_every_kind(tmp_path: Path) -> None:
    for end in ("\n", "\r\n", "\r"):
        csv = end.join(["id,text", '1,"one, two"', "2,three", ""]).encode()
        assert found(tmp_path, "a.csv", csv) == [{"id": "1", "text": "one, two"}, {"id": "2", "text": "three"}]
        assert found(tmp_path, "a.jsonl", end.join(['{"text": "one"}', '{"text": "two"}']).encode()) == [
            {"text": "one"},
            {"text": "two"},
        ]


@pytest.mark.fault("N13")
@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("a.txt", b"caf\xe9", r"not UTF-8 at byte 3"),
        ("a.csv", b"text\ncaf\xe9\n", r"not UTF-8 at byte 3 \(.*a\.csv:2\)"),
        ("a.txt", "no mark".encode("utf-16-le"), "UTF-16 without its mark"),
        ("a.bin", bytes(range(256)), "binary"),
        ("a.zip", b"PK\x03\x04" + bytes(40), "zip archive"),
        ("a.tar.gz", gzip.compress(b"a.txt".ljust(257, b"\0") + b"ustar" + bytes(250)), "tar archive"),
        ("a.jsonl", b"%PDF-1.7 ...", "PDF"),
        ("a.txt", b"<!DOCTYPE html>\n<html>Entry not found</html>", "a web page"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 5\n", "Git LFS pointer"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 5\n", "Git LFS pointer"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b"\n', r"not JSON: .*a\.jsonl:2"),
        ("a.json", b'[{"text": "a"},', "not JSON: .*line 1 column 16"),
        ("a.json", b"5", "the JSON is a number"),
        ("a.csv", b"id,text\n1,hello, world\n", r"3 cells where the first row names 2 columns \(.*row 2\)"),
        ("a.csv", b'id,text\n1,a\n2,"open\n', "not CSV: unexpected end of data"),
        ("a.jsonl.gz", gzip.compress((LINES + b"\n") * 99)[:-9], "cannot be read: Compressed file ended"),
        ("a.jsonl.zst", PACKED[".zst"](LINES)[:-4], "cannot be read: Truncated"),
        ("a.parquet", FILES["a.parquet"][:60], "no Parquet file"),
        ("a.parquet", b"text", "no Parquet file"),
        ("a.arrow", b"text", "no Arrow file"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # not the bytes: a gzip header holds the time
)
def test_what_is_no_text_is_refused_by_name(name: str, data: bytes, told: str, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=told) as caught:
        found(tmp_path, name, data)
    assert caught.value.way_out and "\n" not in str(caught.value)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_bytes(LINES)
    with pytest.raises(CalibrationError, match=r"directory.*data\.jsonl"):
        list(read_rows(tmp_path))
    with pytest.raises(CalibrationError, match="no such file"):
        list(read_rows(tmp_path / "absent.txt"))
    with pytest.raises(CalibrationError, match="not a regular file"):
        list(read_rows(Path("/dev/null")))

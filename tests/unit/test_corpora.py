"""Where documents come from. The hub's corpora are read by `datasets` from local folders laid out as on the hub."""

import gzip
import itertools
import json
import logging
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from leangrid.data.corpora import joined, texts
from leangrid.errors import CalibrationError

pytestmark = pytest.mark.filterwarnings("ignore")  # datasets' own


def c4_folder(root: Path, documents: int = 30) -> None:
    folder = root / "allenai" / "c4" / "en"
    folder.mkdir(parents=True)
    rows = [{"text": f"document {index} of the web", "timestamp": "2019", "url": "u"} for index in range(documents)]
    for part in ("c4-train.00000-of-01024", "c4-validation.00000-of-00008"):
        lines = "".join(json.dumps(row | {"text": f"{part[3:8]} {row['text']}"}) + "\n" for row in rows)
        (folder / f"{part}.json.gz").write_bytes(gzip.compress(lines.encode()))


def test_c4_streams_in_order_and_shuffles_by_the_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    c4_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    plain = list(texts("c4"))
    assert plain == [f"train document {index} of the web" for index in range(30)]
    shuffled = list(texts("c4", seed=1))
    assert sorted(shuffled) == sorted(plain) and shuffled != plain
    assert shuffled == list(texts("c4", seed=1)) != list(texts("c4", seed=2))
    assert next(texts("c4", split="test")).startswith("valid document 0")


def test_wikitext2_has_its_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "Salesforce" / "wikitext"
    (folder / "wikitext-2-raw-v1").mkdir(parents=True)
    files = "".join(f"  - split: {split}\n    path: wikitext-2-raw-v1/{split}-*\n" for split in ("train", "test"))
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: wikitext-2-raw-v1\n  data_files:\n{files}---\n")
    for split in ("train", "test"):
        rows = pyarrow.table({"text": ["", f" = {split} = \n", "prose\n"]})
        pyarrow.parquet.write_table(rows, folder / "wikitext-2-raw-v1" / f"{split}-00000-of-00001.parquet")
    monkeypatch.chdir(tmp_path)
    assert list(texts("wikitext2")) == ["", " = train = \n", "prose\n"]
    assert joined("wikitext2") == "\n\n = test = \n\n\nprose\n"  # GPTQ's "\n\n".join over the test rows


@pytest.mark.parametrize("name", ["c4", "wikitext2"])
def test_without_a_network_the_error_names_what_works(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(CalibrationError) as caught:
        next(texts(name))
    assert "self" in str(caught.value) and "embedded" in str(caught.value) and caught.value.exit_code == 2


def test_embedded_is_english_long_enough_and_the_same_twice(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    documents = list(texts("embedded"))
    assert "smoke tests" in caplog.text
    assert documents == list(texts("embedded"))
    assert sum(map(len, documents)) > 1_000_000  # 128 x 2048 tokens at 4 characters
    words = " ".join(documents).lower().split()
    assert sum(word in ("the", "a", "of", "to", "is", "and") for word in words) > 0.1 * len(words)


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbfone\n\ntwo \xc3\xa9\r\n")
    assert list(texts(str(file))) == ["one\n\ntwo é\r\n"]


def test_json_lines_take_text_then_prefix_and_completion_then_the_first_string(tmp_path: Path) -> None:
    rows = [{"id": "x", "text": "a"}, {"prefix": "b", "gold_completion": "c"}, {"n": 1, "body": "d"}, "e"]
    file = tmp_path / "a.jsonl"
    file.write_text("\n\n".join(map(json.dumps, rows)))
    assert list(texts(str(file))) == ["a", "bc", "d", "e"]
    assert joined(str(file)) == "a\n\nbc\n\nd\n\ne"


def test_json_lines_are_read_lazily(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a"}\n{"text": "b"}\nnot json\n')
    assert list(itertools.islice(texts(str(file)), 2)) == ["a", "b"]


@pytest.mark.parametrize(
    ("content", "told"),
    [(b'{"text": "a"}\nnot json\n', ":2"), (b'{"text": "a"}\n{"n": 1}\n', ":2"), (b"[" * 100_000, ":1"), (b'{"text": "\xff"}', "byte 10")],
)
def test_a_bad_json_line_is_named(content: bytes, told: str, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(content)
    with pytest.raises(CalibrationError, match=told):
        list(texts(str(file)))


def test_no_such_corpus(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="wikitext2"):
        texts(str(tmp_path / "absent.txt"))


def test_an_empty_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text(" \n")
    with pytest.raises(CalibrationError, match="empty"):
        joined(str(file))

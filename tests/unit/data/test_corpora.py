"""Where documents come from. The hub's corpora are read by `datasets` from local folders laid out as on the hub."""

import gzip
import itertools
import json
import logging
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from corpus_texts import read_texts

from leangrid.data.corpora import check_corpus, find_corpus_file, read_joined_text
from leangrid.data.documents import Reading
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
    plain = list(read_texts("c4"))
    assert plain == [f"train document {index} of the web" for index in range(30)]
    shuffled = list(read_texts("c4", seed=1))
    assert sorted(shuffled) == sorted(plain) and shuffled != plain
    assert shuffled == list(read_texts("c4", seed=1)) != list(read_texts("c4", seed=2))
    assert next(read_texts("c4", split="test")).startswith("valid document 0")


def test_wikitext2_has_its_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "Salesforce" / "wikitext"
    (folder / "wikitext-2-raw-v1").mkdir(parents=True)
    files = "".join(f"  - split: {split}\n    path: wikitext-2-raw-v1/{split}-*\n" for split in ("train", "test"))
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: wikitext-2-raw-v1\n  data_files:\n{files}---\n")
    for split in ("train", "test"):
        rows = pyarrow.table({"text": ["", f" = {split} = \n", "prose\n"]})
        pyarrow.parquet.write_table(rows, folder / "wikitext-2-raw-v1" / f"{split}-00000-of-00001.parquet")
    monkeypatch.chdir(tmp_path)
    assert list(read_texts("wikitext2")) == ["", " = train = \n", "prose\n"]
    assert read_joined_text("wikitext2") == "\n\n = test = \n\n\nprose\n"  # GPTQ's "\n\n".join over the test rows


@pytest.mark.parametrize("name", ["c4", "wikitext2"])
def test_without_a_network_the_error_names_what_works(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(CalibrationError) as caught:
        next(read_texts(name))
    assert "self" in str(caught.value) and "embedded" in str(caught.value) and caught.value.exit_code == 2


def test_embedded_is_english_long_enough_and_the_same_twice(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    documents = list(read_texts("embedded"))
    assert "smoke tests" in caplog.text
    assert documents == list(read_texts("embedded"))
    assert sum(map(len, documents)) > 1_000_000  # 128 x 2048 tokens at 4 characters
    words = " ".join(documents).lower().split()
    assert sum(word in ("the", "a", "of", "to", "is", "and") for word in words) > 0.1 * len(words)


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbfone\n\ntwo \xc3\xa9\r\n")
    assert list(read_texts(str(file))) == ["one\n\ntwo é\r\n"]


def test_json_lines_take_text_or_prefix_and_completion_or_a_string(tmp_path: Path) -> None:
    rows = [{"id": "x", "text": "a"}, {"prefix": "b", "gold_completion": "c"}, "e"]
    file = tmp_path / "a.jsonl"
    file.write_text("\n\n".join(map(json.dumps, rows)))
    assert list(read_texts(str(file))) == ["a", "bc", "e"]
    assert read_joined_text(str(file)) == "a\n\nbc\n\ne"


@pytest.mark.fault("N13")
def test_rows_without_text_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [{"text": "a"}, {"text": None}, {"text": " \n"}, {"n": 1}, {"text": 5}, {"text": "b"}]
    file, reading = tmp_path / "a.jsonl", Reading("a.jsonl")
    file.write_text("\n".join(map(json.dumps, rows)))
    assert list(read_texts(str(file), reading=reading)) == ["a", "b"]
    assert (reading.used, reading.blank, reading.strange) == (2, 2, 2)
    assert reading.list_notices() == [
        "a.jsonl: 2 of 6 rows left out (hold no text)",
        "a.jsonl: 2 of 6 rows left out (no column that is known)",
    ]


@pytest.mark.fault("N13")
@pytest.mark.parametrize(
    ("rows", "column", "told"),
    [
        (
            [{"id": "a-1", "url": "https://example.org", "title": "prose"}],
            None,
            "there are: id, url, title.*--text-field",
        ),
        ([{"text": "a", "id": 1}], "body", "no row has a column 'body'; there are: text, id"),
        ([{"body": 3}], "body", "column 'body' holds a number"),
        ([{"text": 3}], None, "column 'text' holds a number"),
        ([{"text": ""}] * 3, None, "holds no text: all of its 3 rows are blank"),
        ([{"text": "\u200b\ufeff \n"}], None, "holds no text"),
        ([{"body": " ", "text": "a"}] * 2, "body", "blank in column 'body'"),
        ([{"messages": "user: hello"}], None, "column 'messages' holds plain text, not a list of messages"),
        ([{"messages": [{"a": 1}]}], None, "column 'messages' holds a list, not messages"),
        ([{"prompt": "the question alone", "id": 1}], None, "there are: prompt, id"),
        ([{"question": "which?", "choices": ["a", "b"], "answer": 1}], None, "column 'answer' holds a number"),
    ],
)
def test_rows_that_hold_no_text_are_refused_with_the_columns_that_are_there(
    rows: list[object], column: str | None, told: str, tmp_path: Path
) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(CalibrationError, match=told):
        list(read_texts(str(file), column=column))


def test_unknown_columns_are_refused_without_reading_all(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"title": "t"}\n' * 2000 + "not json")
    with pytest.raises(CalibrationError, match="title"):
        list(read_texts(str(file)))


def test_a_column_is_refused_where_there_are_none(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("plain")
    with pytest.raises(CalibrationError, match="has no columns"):
        list(read_texts(str(file), column="body"))
    with pytest.raises(CalibrationError, match="--text-field"):
        read_texts("c4", column="body")


def hub_folder(root: Path) -> None:
    """A data set of two configurations with two splits, laid out as on the hub."""
    folder = root / "org" / "name"
    configs = "".join(
        f"- config_name: {config}\n  data_files:\n"
        + "".join(f"  - split: {split}\n    path: {config}/{split}.jsonl\n" for split in ("train", "test"))
        for config in ("default", "other")
    )
    for config in ("default", "other"):
        (folder / config).mkdir(parents=True)
        for split in ("train", "test"):
            rows = [
                {"id": f"{index}", "body": f"{config} {split} {index}", "text": f"text {index}"} for index in range(20)
            ]
            (folder / config / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")


def test_a_data_set_of_the_hub_by_name_split_and_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    reading = Reading("hf:org/name:test:body")
    assert list(read_texts("hf:org/name:test:body", reading=reading)) == [
        f"default test {index}" for index in range(20)
    ]
    assert reading.columns == ["body"] and any("folder" in notice for notice in reading.list_notices())
    assert next(read_texts("hf:org/name/other:train:body")) == "other train 0"
    assert next(read_texts("hf:org/name", split="test")) == "text 0"
    assert next(read_texts("hf:org/name", column="body")) == "default train 0"
    shuffled = list(read_texts("hf:org/name:train:body", seed=1))
    assert shuffled == list(read_texts("hf:org/name:train:body", seed=1)) != list(read_texts("hf:org/name:train:body"))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("hf:org/name:absent:body", "absent"),
        ("hf:org/name/none:train", "none"),
        ("hf:org/name:train:words", "no row has a column 'words'; there are: id, body, text"),
        ("hf:org/name:train[:5]:body", "slices"),
        ("hf:", "hf:org/name:split:column"),
        ("hf:a/b/c/d", "hf:org/name:split:column"),
        ("org/none", "hf:org/none"),
    ],
)
def test_a_data_set_that_is_not_there_is_refused(
    name: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CalibrationError) as caught:
        list(read_texts(name))
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_an_unreachable_data_set_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "datasets.load_dataset", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("Couldn't reach\n'org/name'"))
    )
    with pytest.raises(
        CalibrationError,
        match=r"cannot be read from the hub: Couldn't reach 'org/name' \(org/name\)\. Without a network",
    ):
        list(read_texts("hf:org/name:train:text"))


def test_json_lines_are_read_lazily(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a"}\n{"text": "b"}\nnot json\n')
    assert list(itertools.islice(read_texts(str(file)), 2)) == ["a", "b"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b'{"text": "a"}\nnot json\n', ":2"),
        (b'{"text": "a"}\n5\n', ":2"),
        (b"[" * 100_000, ":1"),
        (b'{"text": "\xff"}', "byte 10"),
    ],
)
def test_a_bad_json_line_is_named(content: bytes, told: str, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(content)
    with pytest.raises(CalibrationError, match=told):
        list(read_texts(str(file)))


def test_no_such_corpus(tmp_path: Path) -> None:
    for name in (str(tmp_path / "absent.txt"), "a text\nin place of its name " * 99, "a\0b", ""):
        with pytest.raises(CalibrationError, match="wikitext2") as caught:
            read_texts(name)
        assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)
        assert find_corpus_file(name) is None


def test_a_text_is_checked_by_its_first_rows(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a"}\nnot json')
    check_corpus(str(file))
    for name in ("c4", "wikitext2", "self", "embedded", "hf:org/name:train:text"):
        check_corpus(name)  # no network
    for name, column in (
        ("self", "body"),
        ("hf:", None),
        (str(tmp_path), None),
        (str(tmp_path / "absent"), None),
        (str(file), "body"),
    ):
        with pytest.raises(CalibrationError):
            check_corpus(name, column)


def test_a_corpus_s_name_is_no_file_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("c4", "text.txt"):
        Path(name).write_text("words")
    assert find_corpus_file("c4") is None and find_corpus_file("hf:text.txt") is None
    assert find_corpus_file("text.txt") == Path("text.txt") and find_corpus_file("./c4") == Path("c4")


def test_an_empty_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text(" \n")
    with pytest.raises(CalibrationError, match="no text"):
        read_joined_text(str(file))

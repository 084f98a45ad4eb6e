"""Rows with pictures through a processor: used, left out, refused; and the files that a run's identity covers."""

import io
import json
from pathlib import Path
from typing import Any

import datasets
import picture_models
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from leangrid.data.corpora import find_pictures_in
from leangrid.data.documents import Reading
from leangrid.data.files import Row, read_rows
from leangrid.data.picture_windows import PictureReader, folder_of, make_picture_windows, picture_files
from leangrid.errors import CalibrationError
from leangrid.models.processor import load_processor
from leangrid.recipe import Recipe

SHOWN, ASKED = {"type": "image"}, {"type": "text", "text": "What?"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return picture_models.save("qwen3_vl", tmp_path_factory.mktemp("model") / "source")


def reader(source: Path, folder: Path = Path(), length: int = 256, column: str | None = None) -> PictureReader:
    return PictureReader(
        load_processor(source), lambda name: name != "attention_mask", torch.bfloat16, length, folder, column,
        Reading("rows"),
    )  # fmt: skip


def rows(*values: Any) -> list[Row]:
    return [Row(f"rows, row {number}", value) for number, value in enumerate(values, 1)]


def encoded(width: int = 24) -> bytes:
    buffer = io.BytesIO()
    picture_models.picture(width).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_parquet_file_as_datasets_writes_it_gives_what_the_processor_gives(source: Path, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": [{**SHOWN, "text": None}, ASKED]}]
    table = pa.Table.from_pylist([{"messages": messages, "images": [{"bytes": encoded(), "path": None}]}] * 2)
    pq.write_table(table, tmp_path / "rows.parquet")
    own = reader(source)
    found = own.read(read_rows(tmp_path / "rows.parquet"), 2)
    text = own.processor.apply_chat_template([{"role": "user", "content": [SHOWN, ASKED]}], tokenize=False)
    wanted = own.processor(text=[text], images=[picture_models.picture(24)], return_tensors="pt")
    assert found[0].keys() == set(wanted) - {"attention_mask"}  # an argument that the model does not take
    assert torch.equal(found[1]["pixel_values"], wanted["pixel_values"].bfloat16())
    assert torch.equal(found[1]["input_ids"], wanted["input_ids"]) and own.pictures == [1, 1]


def test_rows_that_cannot_be_used_are_left_out_and_counted(source: Path) -> None:
    said = {"question": "What?", "answer": "A cat.", "image": encoded()}
    own = reader(source, length=40)
    long = {**said, "answer": "A cat. " * 40}
    recipe = Recipe(calibration="rows.jsonl", samples=2, length=40)
    values = (said, long, {"image": encoded()}, {"question": "", "answer": "", "image": None}, said, said)
    found, unseen = make_picture_windows(recipe, rows(*values), own, 2)
    assert (len(found), len(unseen)) == (2, 1)
    assert own.reading.to_json() == {
        "source": "rows", "fields": ["question", "answer", "image"], "template": own.reading.template,
        "template_sha256": own.reading.template_sha256, "rows": 6, "pictures": 2,
        "rows_left_out": {"strange": 1, "blank": 1, "long": 1},
    }  # fmt: skip
    assert any("more than 40 tokens: --length" in notice for notice in own.reading.list_notices())


def test_a_caption_becomes_a_conversation_with_the_picture_first(source: Path) -> None:
    own = reader(source, column="caption")
    (row,) = own.read(rows({"caption": "A cat.", "image": encoded()}), 1)
    text = own.processor.tokenizer.decode(row["input_ids"][0])
    assert text.startswith("<turn>user<|vision_start|><|image_pad|>") and text.endswith("<|vision_end|> A cat.</turn>")


def test_without_a_template_the_picture_is_the_processors_token(source: Path) -> None:
    own = reader(source)
    own.processor.chat_template = own.processor.tokenizer.chat_template = None
    own = PictureReader(own.processor, own.takes, own.dtype, 256, Path(), None, Reading("rows"))
    found = own.read(rows({"text": "A cat.", "image": encoded()}, {"question": "What?", "answer": "A cat."}), 2)
    texts = [own.processor.tokenizer.decode(row["input_ids"][0]) for row in found]
    assert texts[0].startswith("<|image_pad|>") and texts[0].endswith("A cat.") and "vision_start" not in texts[0]
    assert texts[1] == "User: What?\nAssistant: A cat."


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([{"caption": "A cat.", "image": b"1"}], "no text in the only row: no column that is known"),
        ([{"text": "A cat.", "image": b"1"}], "what the row holds is no sound picture.*rows, row 1"),
    ],
)
@pytest.mark.fault("N13")
def test_rows_without_text_or_with_a_broken_picture_are_refused(values: list[Any], said: str, source: Path) -> None:
    with pytest.raises(CalibrationError, match=said):
        reader(source).read(rows(*values), 2)


@pytest.mark.fault("N13")
def test_what_the_processor_refuses_is_said_with_the_row(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flat = io.BytesIO()
    picture_models.picture(900, 2).save(flat, "PNG")
    with pytest.raises(CalibrationError, match=r"processor cannot take the row: absolute aspect ratio.*rows, row 1"):
        reader(source).read(rows({"text": "A line.", "image": flat.getvalue()}), 1)
    own = reader(source)
    own.processor.tokenizer.chat_template = own.processor.chat_template = "{{ messages[0].content[1].text }}"
    own = PictureReader(own.processor, own.takes, own.dtype, 256, Path(), None, Reading("rows"))
    with pytest.raises(CalibrationError, match="refuses the conversations: it has 0 places for the 1 pictures"):
        own.read(rows({"text": "A cat.", "image": encoded()}), 1)


def test_the_files_of_the_first_rows_are_known_without_opening_them(tmp_path: Path) -> None:
    lines = [{"text": "a", "image": "a.png"}, {"text": "b"}, {"text": "c", "images": ["b.png", "c.png"]}]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + '\n{"text": ')
    names = [path.name for path in picture_files(read_rows(file), folder_of(str(file)), 9)]
    assert names == ["a.png", "b.png", "c.png"]  # up to the row that cannot be read
    assert [path.name for path in picture_files(read_rows(file), tmp_path, 1)] == ["a.png"]
    (tmp_path / "plain.txt").write_text("words")
    assert picture_files(read_rows(tmp_path / "plain.txt"), tmp_path, 9) == []
    assert folder_of("hf:org/name") == Path()


def test_a_data_set_of_the_hub_gives_pictures_and_a_model_of_text_is_not_asked(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    made = datasets.Dataset.from_list([{"image": {"bytes": encoded(), "path": None}, "text": "A cat."}] * 3, features)
    (tmp_path / "shown").mkdir()
    made.to_parquet(tmp_path / "shown" / "train.parquet")
    found = find_pictures_in("hf:shown", takes_pictures=True, seed=0)
    assert found is not None and reader(source, folder_of("hf:shown")).read(found, 3).shape[0] == 3
    assert folder_of("hf:shown") == Path("shown")
    assert find_pictures_in("hf:shown", takes_pictures=False) is None
    with pytest.raises(CalibrationError, match="this model takes text alone"):
        find_pictures_in("shown/train.parquet", takes_pictures=False)
    assert find_pictures_in("shown/train.parquet", takes_pictures=False, column="text") is None
    assert [find_pictures_in(name, takes_pictures=True) for name in ("c4", "self", "gone.jsonl")] == [None] * 3

"""Where the pictures of a row are, and where they stand in its text: row N13 of the fault table."""

import json
from pathlib import Path
from typing import Any

import pytest

from leangrid.data.chat import Chat
from leangrid.data.files import Row, read_rows
from leangrid.data.picture_rows import (
    PictureRow,
    as_parts,
    as_text,
    find_pictures,
    first_rows_have,
    has_picture_column,
    shows_pictures,
)
from leangrid.errors import CalibrationError

pytestmark = pytest.mark.fault("N13")
SHOWN, ASKED, SAID = {"type": "image"}, {"type": "text", "text": "What?"}, {"role": "assistant", "content": "A cat."}


def found(value: Any, column: str | None = None) -> PictureRow:
    return find_pictures(Row("rows.jsonl:3", value), column)


def contents(row: PictureRow) -> list[Any]:
    assert row.found.conversation is not None
    return [message["content"] for message in as_parts(row.found.conversation).messages]


def test_parts_without_a_picture_take_those_of_the_column_in_order() -> None:
    messages = [{"role": "user", "content": [SHOWN, ASKED, SHOWN]}, SAID]
    row = found({"messages": messages, "images": ["a.png", b"bytes"]})
    assert row.pictures == ("a.png", b"bytes") and row.found.columns == ("messages", "images")
    assert contents(row) == [[SHOWN, ASKED, SHOWN], "A cat."]


def test_parts_name_the_picture_by_index_or_hold_it() -> None:
    parts = [{"type": "image", "index": 1, "text": None}, {"type": "image", "index": 0}]
    assert found({"messages": [{"role": "user", "content": parts}], "images": ["a", "b"]}).pictures == ("b", "a")
    own = [
        {"type": "image", "image": "x.png"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
        {"type": "image", "bytes": b"1"},
    ]
    row = found({"messages": [{"role": "user", "content": [*own, ASKED]}, SAID]})
    assert row.pictures == ("x.png", "data:image/png;base64,AAAA", b"1")
    assert contents(row) == [[SHOWN, SHOWN, SHOWN, ASKED], "A cat."]


def test_a_word_in_the_text_is_a_place_else_they_come_first_in_what_the_user_says() -> None:
    row = found({"conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}],
                 "image": "a.png"})  # fmt: skip
    assert contents(row) == [[SHOWN, ASKED], "A cat."] and row.pictures == ("a.png",)
    pair = found({"Image": {"bytes": b"1", "path": None}, "question": "What?", "answer": "A cat."})
    assert contents(pair) == [[SHOWN, ASKED], "A cat."] and pair.pictures == ({"bytes": b"1", "path": None},)
    system = {"role": "system", "content": "Be brief."}
    assert contents(found({"messages": [system, {"role": "user", "content": "What?"}], "images": ["a"]})) == [
        "Be brief.",
        [SHOWN, ASKED],
    ]
    plain = found({"text": "before <image> after", "image": "a.png"})
    assert plain.found.text is not None and as_text(plain.found.text, "[P]") == "before [P] after"
    named = found({"caption": "A cat.", "image": "a.png"}, "caption")
    assert named.found.text is not None and as_text(named.found.text, "[P]") == "[P]A cat."


def test_messages_as_json_text_and_rows_without_pictures() -> None:
    row = found({"messages": json.dumps([{"role": "user", "content": [SHOWN, ASKED]}, SAID]), "images": '["a.png"]'})
    assert row.pictures == ("a.png",) and contents(row)[0] == [SHOWN, ASKED]
    none = found({"messages": [{"role": "user", "content": "What?"}, SAID], "images": []})
    assert none.pictures == () and contents(none) == ["What?", "A cat."]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"messages": [{"role": "user", "content": [SHOWN, ASKED]}]}, "0 pictures and its text 1 place for"),
        (
            {"messages": [{"role": "user", "content": [SHOWN, ASKED]}], "images": ["a", "b"]},
            "2 pictures and its text 1",
        ),
        ({"text": "<image><image>", "image": "a"}, "1 picture and its text 2 places"),
    ],
)
def test_more_or_fewer_places_than_pictures_are_refused(value: Any, said: str) -> None:
    with pytest.raises(CalibrationError, match=f"{said}.*rows.jsonl:3"):
        found(value)


def test_which_files_have_pictures(tmp_path: Path) -> None:
    def written(name: str, *rows: Any) -> list[Row]:
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
        return list(read_rows(tmp_path / name))

    text = written("text.jsonl", {"text": "a"}, {"text": "b", "image": None})
    assert not first_rows_have(shows_pictures, text)
    column = written("column.jsonl", {"text": "a"}, {"text": "b", "images": ["a.png"]})
    assert first_rows_have(has_picture_column, column) and first_rows_have(shows_pictures, column)
    parts = written("parts.jsonl", {"messages": [{"role": "user", "content": [{**SHOWN, "image": "a.png"}, ASKED]}]})
    assert not first_rows_have(has_picture_column, parts) and first_rows_have(shows_pictures, parts)
    (tmp_path / "plain.txt").write_text("image")
    assert not first_rows_have(shows_pictures, read_rows(tmp_path / "plain.txt"))
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    assert not first_rows_have(shows_pictures, read_rows(tmp_path / "broken.jsonl"))


def test_a_template_that_takes_parts_gets_them_and_a_system_message_is_merged() -> None:
    class Template:
        """As a tokenizer whose template takes no system message, and contents as parts only."""

        chat_template = "parts"

        def get_added_vocab(self) -> dict[str, int]:
            return {}

        def apply_chat_template(self, messages: list[dict[str, Any]], **_: Any) -> str:
            if messages[0]["role"] == "system":
                raise ValueError("no system message")
            return "".join("[P]" if p["type"] == "image" else p["text"] for m in messages for p in m["content"])

    system = {"role": "system", "content": "Be brief."}
    row = found({"messages": [system, {"role": "user", "content": [SHOWN, ASKED]}, SAID], "images": ["a"]})
    assert row.found.conversation is not None
    chat = Chat(Template())
    assert chat.render(as_parts(row.found.conversation)) == "Be brief.\n\n[P]What?A cat." and chat.merged == 1

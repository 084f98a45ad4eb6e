"""Pictures as rows name or hold them, and what is refused: row N13 of the fault table."""

import base64
import io
import re
from pathlib import Path

import picture_models
import pytest

from leangrid.data.pictures import open_picture, picture_file
from leangrid.errors import CalibrationError

pytestmark = pytest.mark.fault("N13")


def encoded(form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    picture_models.picture(12, 8).save(buffer, form)
    return buffer.getvalue()


def test_every_form_gives_the_same_picture(tmp_path: Path) -> None:
    wanted = picture_models.picture(12, 8)
    (tmp_path / "a.png").write_bytes(encoded())
    forms = [
        "a.png",
        str(tmp_path / "a.png"),
        encoded(),
        {"bytes": encoded(), "path": "elsewhere.png"},
        {"bytes": None, "path": "a.png"},
        "data:image/png;base64," + base64.b64encode(encoded()).decode(),
        wanted.convert("RGBA"),
    ]
    for source in forms:
        assert open_picture(source, tmp_path, "row 1").tobytes() == wanted.tobytes()


def test_the_files_that_rows_name() -> None:
    folder = Path("data")
    assert picture_file("a.png", folder) == folder / "a.png"
    assert picture_file({"bytes": None, "path": "b.png"}, folder) == folder / "b.png"
    others = (b"1", {"bytes": b"1", "path": "b.png"}, "https://host/a.png", "data:image/png;base64,AA", None)
    assert [picture_file(other, folder) for other in others] == [None] * len(others)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("gone.png", "the picture 'gone.png' cannot be read: No such file"),
        ("text.png", "'text.png' is no sound picture: cannot identify image file"),
        ("cut.jpg", "'cut.jpg' is no sound picture"),
        (b"no picture", "what the row holds is no sound picture"),
        ("https://host/a.png", "'https://host/a.png' is an address"),
        ("data:image/png;base64,A", "a picture is no base64"),
        (7, "a picture is int, not a path"),
    ],
)
def test_what_is_no_picture_is_refused_with_its_row(source: object, said: str, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("words")
    whole = encoded("JPEG")
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) * 3 // 4])
    with pytest.raises(CalibrationError, match=re.escape(said)) as caught:
        open_picture(source, tmp_path, "rows.jsonl:3")
    assert "rows.jsonl:3" in str(caught.value) and "0x" not in str(caught.value)

"""Finds the pictures of a row, and where they stand in its text.

Pictures are in a column ``images`` or ``image``, or in parts of messages such as {"type": "image", "image": "a.png"}.
Parts without a picture of their own take those of the column, in order or by ``index``. Where no part is a picture,
each "<image>" in the text is one; where there is none of these either, they come first in what the user says first."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from leangrid.data.conversations import Conversation, Found, find_text, load_cell
from leangrid.data.files import Row
from leangrid.errors import CalibrationError

COLUMNS = ("images", "image")
_PARTS = ("image", "image_url", "input_image")
_HOLDS = ("image", "image_url", "url", "path", "base64", "bytes")
_WORD = "<image>"
# A picture's place in a text until the chat template is applied; the characters are of no language.
_OPEN, _CLOSE = "\ue000", "\ue001"
_PLACE = re.compile(f"{_OPEN}(\\d+){_CLOSE}")
_PLACE_OF_A_PART = re.compile(f"\n?{_OPEN}(\\d+){_CLOSE}\n?")
_LOOKED_AT = 256  # rows of a file that may have the column; after them it has none


@dataclass(frozen=True)
class PictureRow:
    """A row and its pictures.

    Attributes:
        found: its text or conversation, with a mark at the place of each picture (``as_parts``, ``as_text``).
        pictures: what each is, as the row names or holds it, in the order of their places.
    """

    found: Found
    pictures: tuple[Any, ...] = ()


def has_picture_column(value: Any) -> bool:
    """Whether a row has a column for pictures, with one in it."""
    return isinstance(value, Mapping) and (name := _column(value)) is not None and bool(_listed(value[name]))


def shows_pictures(value: Any) -> bool:
    """Whether a row has a column for pictures, or a message with one."""
    return has_picture_column(value) or _holds_pictures(value)


def first_rows_have(wanted: Callable[[Any], bool], rows: Iterable[Row]) -> bool:
    """Whether ``wanted`` holds for the value of one of the first 256 rows; a plain text has none.

    A row that cannot be read ends the look: who reads that far is told."""
    try:
        for row in islice(rows, _LOOKED_AT):
            if not isinstance(row.value, Mapping | list):
                return False
            if wanted(row.value):
                return True
    except CalibrationError:
        return False
    return False


def find_pictures(row: Row, column: str | None) -> PictureRow:
    """The text or conversation of a row, and its pictures at their places.

    Args:
        column: that holds the text; None: the known ones (conversations.find_text).

    Raises:
        CalibrationError: text and pictures do not belong together: there are more or fewer places than pictures.
    """
    taken, own = _Taken(row), row.value
    if isinstance(own, Mapping):
        name = _column(own)
        taken.listed = [] if name is None else _listed(own[name])
        own = {key: _marked(value, taken) for key, value in own.items() if key != name}
    else:
        own = _marked(own, taken)
    found = find_text(own, column)
    if found.why:
        return PictureRow(found)
    if taken.listed and not taken.given:
        found = _placed(found, taken)
    elif len(taken.used) < len(taken.listed):
        raise _unlike(row, len(taken.listed), len(taken.used))
    name = _column(row.value) if isinstance(row.value, Mapping) and taken.listed else None
    found = replace(found, columns=(*found.columns, *([] if name is None else [name])))
    texts = [found.text or ""] if found.conversation is None else _said(found.conversation)
    order = [int(number) for text in texts for number in _PLACE.findall(text)]
    return PictureRow(found, tuple(taken.given[number] for number in order))


def as_parts(conversation: Conversation) -> Conversation:
    """The conversation with messages that show pictures as parts: {"type": "image"} and {"type": "text", ...}."""
    return Conversation(
        [{**message, "content": _parts(message["content"])} for message in conversation.messages], conversation.tools
    )


def as_text(text: str, token: str) -> str:
    """The text with ``token`` at the place of each picture."""
    return _PLACE.sub(lambda _: token, text)


@dataclass
class _Taken:
    """The pictures of one row: those its column lists, those that got a place, and which of the listed ones did."""

    row: Row

    def __post_init__(self) -> None:
        self.listed: list[Any] = []
        self.given: list[Any] = []
        self.used: set[int] = set()

    def place(self, part: Mapping[str, Any]) -> str:
        """The place of a part that is a picture."""
        held = next((part[key] for key in _HOLDS if part.get(key) is not None), None)
        if isinstance(held, Mapping) and "url" in held:
            held = held["url"]
        if held is None:
            index = part.get("index")
            number = index if isinstance(index, int) else len(self.used)
            if not 0 <= number < len(self.listed):
                raise _unlike(self.row, len(self.listed), len(self.used) + 1)
            self.used.add(number)
            held = self.listed[number]
        return self.add(held)

    def add(self, picture: Any) -> str:
        """A place for the next picture."""
        self.given.append(picture)
        return f"{_OPEN}{len(self.given) - 1}{_CLOSE}"


def _column(cells: Mapping[Any, Any]) -> Any:
    """The name of the column for pictures; None without one."""
    names = {str(name).strip().casefold(): name for name in reversed(list(cells))}
    return next((names[name] for name in COLUMNS if name in names), None)


def _listed(value: Any) -> list[Any]:
    value = load_cell(value)
    if value is None or (isinstance(value, str) and not value.strip()):
        return []
    return [one for one in value if one is not None] if isinstance(value, list | tuple) else [value]


def _holds_pictures(value: Any) -> bool:
    if isinstance(value, Mapping):
        return _is_picture(value) or any(map(_holds_pictures, value.values()))
    return isinstance(value, list) and any(map(_holds_pictures, value))


def _is_picture(part: Mapping[Any, Any]) -> bool:
    return part.get("type") in _PARTS


def _marked(value: Any, taken: _Taken) -> Any:
    """The cell with parts that are text in place of those that are pictures."""
    if isinstance(value, str):
        loaded = load_cell(value) if '"image' in value else value
        return value if isinstance(loaded, str) else _marked(loaded, taken)
    if isinstance(value, Mapping):
        if _is_picture(value):
            return {"type": "text", "text": taken.place(value)}
        return {key: _marked(item, taken) for key, item in value.items()}
    return [_marked(item, taken) for item in value] if isinstance(value, list) else value


def _placed(found: Found, taken: _Taken) -> Found:
    """The pictures of the column at each "<image>", or in front of what the user says first."""
    texts = [found.text or ""] if found.conversation is None else _said(found.conversation)
    words = sum(text.count(_WORD) for text in texts)
    if words not in (0, len(taken.listed)):
        raise _unlike(taken.row, len(taken.listed), words)
    places = iter([taken.add(picture) for picture in taken.listed])
    if words:
        return _changed(found, [re.sub(_WORD, lambda _: next(places), text) for text in texts])
    first = 0
    if found.conversation is not None:
        roles = [message["role"] for message in found.conversation.messages]
        first = roles.index("user") if "user" in roles else 0
    texts[first] = "".join(places) + texts[first]
    return _changed(found, texts)


def _changed(found: Found, texts: list[str]) -> Found:
    if found.conversation is None:
        return replace(found, text=texts[0])
    messages = found.conversation.messages
    said = [{**message, "content": text} for message, text in zip(messages, texts, strict=True)]
    return replace(found, conversation=replace(found.conversation, messages=said))


def _said(conversation: Conversation) -> list[str]:
    return [message["content"] for message in conversation.messages]


def _parts(content: str) -> Any:
    pieces = _PLACE_OF_A_PART.split(content)
    if len(pieces) == 1:
        return content
    parts: list[dict[str, str]] = []
    for index, piece in enumerate(pieces):  # text and the number of a place in turn
        if index % 2:
            parts.append({"type": "image"})
        elif piece:
            parts.append({"type": "text", "text": piece})
    return parts


def _unlike(row: Row, pictures: int, places: int) -> CalibrationError:
    def counted(number: int, what: str) -> str:
        return f"{number} {what}{'' if number == 1 else 's'}"

    what = f"the row has {counted(pictures, 'picture')} and its text {counted(places, 'place')} for them"
    return CalibrationError(what, row.where, 'Give one {"type": "image"} or "<image>" for each picture')

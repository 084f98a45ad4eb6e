"""Opens the pictures that a row names or holds."""

import base64
import binascii
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from leangrid.errors import CalibrationError, first_line

_ADDRESS = re.compile(r"(?i)(https?|ftp|s3|gs|hf)://")
_EMBEDDED = re.compile(r"(?is)data:image/[\w.+-]+;base64,")
_WAY_OUT = "Mend or remove the row"


def open_picture(source: Any, folder: Path, where: str) -> Any:
    """The picture as Pillow's Image in RGB, turned as its own data says.

    Args:
        source: a path, relative to ``folder`` or absolute; the bytes of a file; {"bytes": ..., "path": ...} as
            ``datasets`` stores pictures; "data:image/...;base64,..."; or an Image.
        where: the row, for messages.

    Raises:
        CalibrationError: there is no such file, it is no picture or a broken one, or it would have to be fetched.
    """
    from PIL import Image, ImageOps

    content, name = (None, "it") if isinstance(source, Image.Image) else _content(source, folder, where)
    try:
        opened = source if content is None else Image.open(io.BytesIO(content))
        return ImageOps.exif_transpose(opened).convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # a picture's format is parsed by foreign code
        raise CalibrationError(f"{name} is no sound picture: {_said(error)}", where, _WAY_OUT) from error


def picture_file(source: Any, folder: Path) -> Path | None:
    """The file that ``source`` names; None for what is no path."""
    if isinstance(source, Mapping):
        return picture_file(source.get("path"), folder) if not source.get("bytes") else None
    if not isinstance(source, str | Path) or _ADDRESS.match(str(source)) or _EMBEDDED.match(str(source)):
        return None
    return folder / str(source).removeprefix("file://")


def _content(source: Any, folder: Path, where: str) -> tuple[bytes, str]:
    """The bytes of a picture's file, and what to call it."""
    if isinstance(source, Mapping) and source.get("bytes"):
        source = source["bytes"]
    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source), "what the row holds"
    if isinstance(source, str) and (found := _EMBEDDED.match(source)):
        try:
            return base64.b64decode(source[found.end() :], validate=False), "what the row holds"
        except binascii.Error as error:
            raise CalibrationError(f"a picture is no base64: {first_line(error)}", where, _WAY_OUT) from None
    if isinstance(source, str) and _ADDRESS.match(source):
        what = f"'{source[:100]}' is an address, and pictures are read from files"
        raise CalibrationError(what, where, "Fetch it, and give the file's path relative to the data file")
    path = picture_file(source, folder)
    if path is None:
        what = f"a picture is {type(source).__name__}, not a path, bytes or an image"
        raise CalibrationError(what, where, 'A row is such as {"images": ["a.png"], "messages": [...]}')
    try:
        return path.read_bytes(), f"'{str(source)[:100]}'"
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        way_out = "Paths of pictures are relative to the data file: put it there, or remove the row"
        raise CalibrationError(f"the picture '{str(source)[:100]}' cannot be read: {why}", where, way_out) from error


def _said(error: Exception) -> str:
    """What Pillow says, without the memory address of what it looked at."""
    return re.sub(r" <_io\.BytesIO object at 0x[0-9a-f]+>", " it", first_line(error)).rstrip(".")

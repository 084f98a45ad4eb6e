"""Makes calibration windows of rows with pictures: what the model's own processor gives for each."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leangrid.data.chat import Chat, TemplateRefusal
from leangrid.data.conversations import Conversation
from leangrid.data.documents import Reading, no_text_error
from leangrid.data.files import Row
from leangrid.data.hub import PREFIX, HubData
from leangrid.data.picture_rows import PictureRow, as_parts, as_text, find_pictures
from leangrid.data.pictures import open_picture, picture_file
from leangrid.data.windows import PictureRows
from leangrid.errors import CalibrationError, first_line
from leangrid.recipe import Recipe

_GIVE_UP = 1000  # after so many rows without a usable one, the rest is not read


@dataclass
class PictureReader:
    """Makes a model's inputs of rows.

    Args:
        processor: transformers' processor of the model.
        takes: whether the model has an argument of this name.
        dtype: in which the model computes, and numbers of pictures are kept.
        length: the most tokens of a row, those of pictures among them.
        folder: to which the paths of pictures are relative.
        column: that holds the text; None: the known ones.
        reading: counts what is read and left out.

    Attributes:
        pictures: how many pictures each row has that was used.
    """

    processor: Any
    takes: Callable[[str], bool]
    dtype: torch.dtype
    length: int
    folder: Path
    column: str | None
    reading: Reading

    def __post_init__(self) -> None:
        self._chat = Chat(self.processor)
        self.reading.length = self.length
        self._columns: list[str] = []
        self.pictures: list[int] = []

    def read(self, rows: Iterable[Row], most: int) -> PictureRows:
        """The first ``most`` rows that can be used, or as many as there are.

        Raises:
            CalibrationError: no row can be used; a picture is missing or broken; text and pictures of a row do not
                belong together; or the processor fails.
        """
        reading, found = self.reading, list[Mapping[str, Tensor]]()
        for row in rows:
            reading.rows += 1
            if isinstance(row.value, dict) and not self._columns:
                self._columns = list(map(str, row.value))
            inputs = self._inputs(row)
            if inputs is not None:
                found.append(inputs)
            if len(found) == most or (not found and reading.rows >= _GIVE_UP):
                break
        if found:
            return PictureRows(found)
        if reading.long:
            what = f"every row has more than {self.length:,} tokens, those of its pictures among them"
            raise CalibrationError(what, reading.source, "Use a longer --length, or smaller pictures")
        raise no_text_error(reading, self._columns, self.column)

    def _inputs(self, row: Row) -> Mapping[str, Tensor] | None:
        """What the processor gives for a row; None, and counted, where the row is left out."""
        reading, shown = self.reading, find_pictures(row, self.column)
        if shown.found.why:
            reading.strange += 1
            reading.why_strange = reading.why_strange or shown.found.why
            return None
        if shown.found.is_blank:
            reading.blank += 1
            return None
        try:
            text = self._text(shown)
        except TemplateRefusal as refusal:
            reading.refused += 1
            reading.complaint = reading.complaint or str(refusal)
            return None
        inputs = self._processed(text, [open_picture(one, self.folder, row.where) for one in shown.pictures], row)
        if inputs["input_ids"].shape[1] > self.length:
            reading.long += 1
            return None
        reading.used += 1
        self.pictures.append(len(shown.pictures))
        reading.media += shown.found.media
        reading.columns += [name for name in shown.found.columns if name not in reading.columns]
        return inputs

    def _text(self, shown: PictureRow) -> str:
        """The text of a row with the processor's own mark at the place of each picture."""
        conversation, chat, reading = shown.found.conversation, self._chat, self.reading
        token = getattr(self.processor, "image_token", None)
        if conversation is None:
            if chat.sha256 is None or not shown.pictures:
                return as_text(shown.found.text or "", token or "")
            conversation = Conversation([{"role": "user", "content": shown.found.text or ""}])
        if chat.sha256 is None:
            text = as_text(chat.render(conversation), token or "")
        else:
            text = chat.render(as_parts(conversation))
        reading.template, reading.template_sha256, reading.merged = chat.name, chat.sha256, chat.merged
        if token and text.count(token) != len(shown.pictures):
            raise TemplateRefusal(f"it has {text.count(token)} places for the {len(shown.pictures)} pictures of a row")
        return text

    def _processed(self, text: str, pictures: list[Any], row: Row) -> Mapping[str, Tensor]:
        opening = getattr(self.processor.tokenizer, "bos_token", None)  # a chat template may write it itself
        special = {"add_special_tokens": False} if opening and text.startswith(opening) else {}
        try:
            given = self.processor(text=[text], images=pictures or None, return_tensors="pt", **special)
        except MemoryError:
            raise
        except Exception as error:  # of any model: it may raise anything
            what = f"the model's processor cannot take the row: {first_line(error)}"
            raise CalibrationError(what, row.where, "Mend or remove the row") from error
        taken = {name: value for name, value in given.items() if self.takes(name)}
        strange = next((name for name, value in taken.items() if not isinstance(value, Tensor)), None)
        if strange is not None or "input_ids" not in taken:
            what = f"the model's processor gives {strange or 'no input_ids'} in a form that leangrid does not pass on"
            raise CalibrationError(what, row.where, "Calibrate this model by text")
        return {name: x.to(self.dtype) if x.is_floating_point() else x for name, x in taken.items()}


def make_picture_windows(
    recipe: Recipe, rows: Iterable[Row], reader: PictureReader, extra: int = 0
) -> tuple[PictureRows, PictureRows]:
    """The calibration windows of ``recipe`` from rows with pictures, and up to ``extra`` rows behind them.

    Raises:
        CalibrationError: there are fewer usable rows than samples; or what ``PictureReader.read`` raises.
    """
    found, reading = reader.read(rows, recipe.samples + extra), reader.reading
    if len(found) < recipe.samples:
        what = f"too few rows: {len(found):,} can be used, {recipe.samples:,} are needed"
        way_out = f"Use --samples {len(found)} or more rows"
        raise CalibrationError("; ".join((what, *reading.list_left_out())), reading.source, way_out)
    reading.pictures = sum(reader.pictures[: recipe.samples])
    return found[: recipe.samples], found[recipe.samples :]


def folder_of(corpus: str) -> Path:
    """To which the paths of pictures in a corpus are relative."""
    if corpus.startswith(PREFIX):
        return HubData.parse(corpus).folder or Path()
    return Path(corpus).parent


def picture_files(rows: Iterable[Row], folder: Path, most: int) -> list[Path]:
    """The files that the first ``most`` rows name as pictures, in order, without opening them.

    What cannot be read is left out: it is said where the row is read for use."""
    found: list[Path] = []
    try:
        for row in islice(rows, most):
            if isinstance(row.value, str):
                break
            pictures = find_pictures(row, None).pictures
            found += [file for file in (picture_file(one, folder) for one in pictures) if file is not None]
    except CalibrationError:
        return found
    return found

"""Makes documents from rows, and counts the rows that are used and left out."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from leangrid.data.chat import Chat, TemplateRefusal
from leangrid.data.conversations import Found, describe_value, find_text, has_text
from leangrid.data.files import Row
from leangrid.errors import CalibrationError

GAP = "\n\n"  # between documents (Frantar et al. 2022)
_GIVE_UP = 1000  # after so many rows without a usable one, the rest is not read
_HOW = "Name the column that holds it with --text-field, or call it text (of conversations: messages)"


class Document(NamedTuple):
    """A text, and the ``gap`` that separates it from the next one."""

    text: str
    gap: str = GAP


@dataclass
class Reading:
    """What was read of a corpus; the counts grow while its documents are read.

    Attributes:
        source: the name that the user gave.
        columns: the columns with text, in the order of their first use.
        template: how conversations became text, in words; None if there were none.
        template_sha256: the sha256 of the model's own template in hex; None without one.
        rows: how many rows were read; 0 for a corpus without rows.
        used: how many of them are in the text.
        blank: rows left out because they hold no text.
        strange: rows left out because they have no known layout; ``why_strange`` says it of the first.
        refused: rows left out because the chat template rejects them; ``complaint`` is what it says of the first.
        media: parts of messages that are no text, such as pictures, which were left out.
        pictures: how many pictures the rows in use have.
        long: rows left out because they have more than ``length`` tokens, pictures counted with them.
        merged: system messages that were put into the user's, because the template rejects them.
        notes: further sentences for the user.
        parts: of a mixture, what was read of each source.
    """

    source: str
    columns: list[str] = field(default_factory=list)
    template: str | None = None
    template_sha256: str | None = None
    rows: int = 0
    used: int = 0
    blank: int = 0
    strange: int = 0
    refused: int = 0
    media: int = 0
    pictures: int = 0
    long: int = 0
    length: int = 0
    merged: int = 0
    why_strange: str = ""
    complaint: str = ""
    notes: list[str] = field(default_factory=list)
    parts: "list[Reading]" = field(default_factory=list)

    def describe_source(self) -> str:
        """Where the text comes from, as "column 'messages' in the chat template of the model"; "" for a plain text."""
        names = " + ".join(f"'{name}'" for name in self.columns)
        named = f"column{'s' if len(self.columns) > 1 else ''} {names}" if names else ""
        return " in ".join(part for part in (named, self.template) if part)

    def list_left_out(self) -> list[str]:
        """One phrase for each reason for which rows were left out, with how many."""
        left = [
            (self.blank, "hold no text"),
            (self.strange, self.why_strange),
            (self.refused, f"the chat template refuses: {self.complaint}"),
            (self.long, f"more than {self.length:,} tokens: --length"),
        ]
        return [f"{count:,} of {self.rows:,} rows left out ({why})" for count, why in left if count]

    def list_notices(self) -> list[str]:
        """One sentence for the user for each thing that was left out or changed."""
        found = [*self.notes, *self.list_left_out()]
        if self.media:
            found.append(f"parts of messages that are no text, such as pictures, left out: {self.media:,}")
        if self.merged:
            found.append(f"system messages put before the user's, for the chat template takes none: {self.merged:,}")
        of_parts = [sentence for part in self.parts for sentence in part.list_notices()]
        return [f"{self.source}: {sentence}" for sentence in found] + of_parts

    def to_json(self) -> dict[str, Any]:
        """What the manifest says about the corpus."""
        left_out = {name: count for name in ("blank", "strange", "refused", "long") if (count := getattr(self, name))}
        return {
            "source": self.source,
            "fields": self.columns,
            "template": self.template,
            "template_sha256": self.template_sha256,
            "rows": self.rows,
            "rows_left_out": left_out,
            **({"pictures": self.pictures} if self.pictures else {}),
            **({"parts": [part.to_json() for part in self.parts]} if self.parts else {}),
        }


def documents_of_rows(rows: Iterable[Row], column: str | None, chat: Chat, reading: Reading) -> Iterator[Document]:
    """Yield the documents of ``rows``; rows without text are left out and counted in ``reading``.

    Args:
        column: the column to use; None: the known ones (see ``conversations.find_text``).

    Raises:
        CalibrationError: no row holds text (after at most 1,000 rows if their columns are unknown), or a row is no
            object.
    """
    columns: list[str] = []
    in_text = False  # inside a plain text that comes in several pieces
    for row in rows:
        if isinstance(row.value, str) and column is None and (in_text or not row.ends):
            in_text = not row.ends
            reading.rows, reading.used = 1, reading.used or int(has_text(row.value))
            yield Document(_clean(row.value), GAP if row.ends else "")
            continue
        if not isinstance(row.value, dict | list | str):
            raise CalibrationError(
                f"the row is {describe_value(row.value)}, not an object", row.where, 'A row is such as {"text": "..."}'
            )
        reading.rows += 1
        columns = columns or (list(map(str, row.value)) if isinstance(row.value, dict) else [])
        document = _document(find_text(row.value, column), chat, reading)
        if document is not None:
            yield document
        elif not reading.used and reading.strange + reading.refused >= _GIVE_UP:
            break
    if not reading.used:
        raise no_text_error(reading, columns, column)


def _document(found: Found, chat: Chat, reading: Reading) -> Document | None:
    """The document of one row; None if it has none. Both are counted in ``reading``."""
    if found.why:
        reading.strange += 1
        reading.why_strange = reading.why_strange or found.why
        return None
    if found.is_blank:
        reading.blank += 1
        return None
    text, gap = found.text or "", GAP
    if found.conversation is not None:
        try:
            text = chat.render(found.conversation)
        except TemplateRefusal as refusal:
            reading.refused += 1
            reading.complaint = reading.complaint or str(refusal)
            return None
        gap = "" if chat.ends_itself(text) else GAP
        reading.template, reading.template_sha256, reading.merged = chat.name, chat.sha256, chat.merged
    reading.media += found.media
    reading.used += 1
    reading.columns += [name for name in found.columns if name not in reading.columns]
    return Document(_clean(text), gap)


def no_text_error(reading: Reading, columns: list[str], column: str | None) -> CalibrationError:
    """The error for a corpus without a usable row, with the reason."""
    there = ", ".join(" ".join(name.split())[:40] for name in columns[:30]) or "none"
    if reading.refused:
        what = f"the model's chat template refuses the conversations: {reading.complaint}"
        return CalibrationError(what, reading.source, "Mend the template in the model's directory, or give plain text")
    if column is not None and not columns:
        return CalibrationError(
            f"no column '{column}', for the text has no columns", reading.source, "Leave out --text-field"
        )
    if reading.strange and column is not None and reading.why_strange.startswith("no column"):
        return CalibrationError(
            f"no row has a column '{column}'; there are: {there}", reading.source, "Name one of them: --text-field NAME"
        )
    if reading.strange:
        return CalibrationError(
            f"no text in {_counted(reading.rows)}: {reading.why_strange}; there are: {there}", reading.source, _HOW
        )
    where = f" in column '{column}'" if column else ""
    rows = f": all of its {reading.rows:,} rows are blank{where}" if reading.rows > 1 else ""
    rows += f"; there are: {there}" if rows and len(columns) > 1 else ""
    return CalibrationError(f"it holds no text{rows}", reading.source, "Give a file or data set that holds text")


def _counted(rows: int) -> str:
    return "the only row" if rows == 1 else f"the first {rows:,} rows" if rows >= _GIVE_UP else f"any of {rows:,} rows"


def join_documents(found: Iterable[Document]) -> str:
    """The documents as one text, with the gap of each but the last after it."""
    parts: list[str] = []
    gap = ""
    for document in found:
        parts += (gap, document.text)
        gap = document.gap
    return "".join(parts)


def _clean(text: str) -> str:
    """Replace lone surrogates, which JSON can express and no tokenizer accepts, by U+FFFD, as decoders do."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

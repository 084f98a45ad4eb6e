"""Documents of rows: what is taken of each row, what is left out, and the account of both."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from leangrid.data.chat import Chat, TemplateRefusal
from leangrid.data.conversations import Found, find, has_text, kind
from leangrid.data.files import Row
from leangrid.errors import CalibrationError

GAP = "\n\n"  # between documents (Frantar et al. 2022)
_GIVE_UP = 1000  # rows of which none is usable, after which the rest is not read
_HOW = "Name the column that holds it with --text-field, or call it text (of conversations: messages)"


class Document(NamedTuple):
    """A text, and what stands between it and the next one."""

    text: str
    gap: str = GAP


@dataclass
class Reading:
    """The account of a corpus: grows while its documents are read.

    Attributes:
        source: the corpus as the user named it.
        columns: those that text was taken from, in the order of their first use.
        template: how conversations became text; None where there were none. ``template_sha256``: of the model's own
        template.
        rows: read so far, ``used``: of them in the text; 0 for what has no rows.
        blank, strange, refused: rows left out, for they hold no text, nothing that is known, or what the chat template
        does not take.
        media: pictures and the like that messages held and that were left out.
        merged: system messages put before the user's, for the template takes none.
        notes: further sentences.
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
    merged: int = 0
    why_strange: str = ""
    complaint: str = ""
    notes: list[str] = field(default_factory=list)

    def words(self) -> str:
        """Where the text comes from: "column 'messages' in the chat template of the model"; "" for a plain text."""
        names = " + ".join(f"'{name}'" for name in self.columns)
        named = f"column{'s' if len(self.columns) > 1 else ''} {names}" if names else ""
        return " in ".join(part for part in (named, self.template) if part)

    def left_out(self) -> list[str]:
        """How many rows were left out, and why."""
        left = [
            (self.blank, "hold no text"),
            (self.strange, self.why_strange),
            (self.refused, f"the chat template refuses: {self.complaint}"),
        ]
        return [f"{count:,} of {self.rows:,} rows left out ({why})" for count, why in left if count]

    def notices(self) -> list[str]:
        """One sentence for each thing that was left out or done otherwise than asked."""
        found = [*self.notes, *self.left_out()]
        if self.media:
            found.append(f"parts of messages that are no text, such as pictures, left out: {self.media:,}")
        if self.merged:
            found.append(f"system messages put before the user's, for the chat template takes none: {self.merged:,}")
        return [f"{self.source}: {sentence}" for sentence in found]

    def to_json(self) -> dict[str, Any]:
        """What the manifest keeps."""
        left_out = {name: count for name in ("blank", "strange", "refused") if (count := getattr(self, name))}
        return {
            "source": self.source,
            "fields": self.columns,
            "template": self.template,
            "template_sha256": self.template_sha256,
            "rows": self.rows,
            "rows_left_out": left_out,
        }


def documents(rows: Iterable[Row], column: str | None, chat: Chat, reading: Reading) -> Iterator[Document]:
    """The documents of some rows, lazily; rows without text are left out and counted in ``reading``.

    Args:
        column: the column to use; None: the known ones (see ``conversations.find``).

    Raises:
        CalibrationError: no row holds text (said after 1,000 rows where their columns are unknown), a row that is no
        object.
    """
    columns: list[str] = []
    piece = False
    for row in rows:
        if isinstance(row.value, str) and column is None and (piece or not row.ends):  # of one plain text
            piece = not row.ends
            reading.rows, reading.used = 1, reading.used or int(has_text(row.value))
            yield Document(_clean(row.value), GAP if row.ends else "")
            continue
        if not isinstance(row.value, dict | list | str):
            raise CalibrationError(
                f"the row is {kind(row.value)}, not an object", row.where, 'A row is such as {"text": "..."}'
            )
        reading.rows += 1
        columns = columns or (list(map(str, row.value)) if isinstance(row.value, dict) else [])
        document = _document(find(row.value, column), chat, reading)
        if document is not None:
            yield document
        elif not reading.used and reading.strange + reading.refused >= _GIVE_UP:
            break
    if not reading.used:
        raise _no_text(reading, columns, column)


def _document(found: Found, chat: Chat, reading: Reading) -> Document | None:
    """The document of one row, or None, counted, where there is none."""
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
        gap = "" if chat.closes(text) else GAP
        reading.template, reading.template_sha256, reading.merged = chat.name, chat.sha256, chat.merged
    reading.media += found.media
    reading.used += 1
    reading.columns += [name for name in found.columns if name not in reading.columns]
    return Document(_clean(text), gap)


def _no_text(reading: Reading, columns: list[str], column: str | None) -> CalibrationError:
    """Why no row was usable, in one sentence."""
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


def joined_text(found: Iterable[Document]) -> str:
    """Documents as one text, each followed by its gap but the last."""
    parts: list[str] = []
    gap = ""
    for document in found:
        parts += (gap, document.text)
        gap = document.gap
    return "".join(parts)


def _clean(text: str) -> str:
    """Halves of characters (lone surrogates, which JSON can spell and no tokenizer reads) become U+FFFD, as decoders do
    it."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

"""The windows of tokens that models are measured on.

As in Frantar et al. (2022) the text is joined, tokenized once and cut into windows that do not overlap."""

import hashlib
from dataclasses import dataclass

from jaxtyping import Int64
from torch import Tensor

from leangrid.data.calibration import check_vocabulary, cut_windows, find_affixes, tokenize_text
from leangrid.data.corpora import read_joined_text
from leangrid.data.documents import Reading
from leangrid.errors import CalibrationError
from leangrid.evaluation.opened import Opened
from leangrid.progress import Event, Progress

LENGTH, WINDOWS = 1024, 12
_CHARACTERS_PER_TOKEN = 16  # more than any tokenizer's average: so much text gives enough tokens
_READ_WHOLE = 1 << 26  # characters; a smaller file is read to its end, so that the hash is of all its text


@dataclass(frozen=True)
class TextRequest:
    """Which windows to measure on, as ``evaluate`` was asked.

    Attributes:
        name: the corpus or file.
        length: tokens of a window; None: LENGTH, or as many as the model takes.
        windows: how many, from the start of the text.
        column: the column of the text's rows; None: text, or conversations.
    """

    name: str
    length: int | None
    windows: int
    column: str | None


@dataclass(frozen=True)
class TextWindows:
    """The token ids of the windows, with the name and the sha256 of the text that they are from."""

    name: str
    sha256: str
    tokens: Int64[Tensor, "windows length"]

    @property
    def predicted(self) -> int:
        """How many tokens are predicted: all but the first of each window."""
        return self.tokens.shape[0] * (self.tokens.shape[1] - 1)


def read_windows(subject: Opened, request: TextRequest, say: Progress) -> TextWindows:
    """Read the text and cut it with the tokenizer of ``subject``; what was left out of the text is said as notices.

    Raises:
        CalibrationError: no tokenizer, a length that the model does not take, too little text, or token ids that the
            model has no embedding for.
    """
    if subject.tokenizer is None:
        raise CalibrationError("the model has no tokenizer", subject.name, "Add its tokenizer files to the directory")
    length, count, name = _length(subject, request), request.windows, request.name
    # The hub's corpora and files of gigabytes are not read to their end.
    enough, reading = _CHARACTERS_PER_TOKEN * count * length, Reading(name)
    from_hub = name == "c4" or name.startswith("hf:")
    text = read_joined_text(name, enough=enough if from_hub else max(enough, _READ_WHOLE), column=request.column,
                            tokenizer=subject.tokenizer, reading=reading)  # fmt: skip
    described = reading.describe_source()
    for sentence in (*reading.list_notices(), *([f"{name}: {described}"] if described else [])):
        say(Event("notice", message=sentence))
    around = find_affixes(subject.tokenizer)
    ids = tokenize_text(subject.tokenizer, text, around)
    found = cut_windows(ids, length, around)
    if len(found) < count:
        what = f"too little text: {len(ids):,} tokens, {count * length:,} needed ({count} x {length})"
        way_out = f"Use --windows {len(found)}" if len(found) else "Use a shorter --length or more text"
        raise CalibrationError(what, name, way_out)
    check_vocabulary(found[:count], subject.embedding_rows)
    sha256 = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return TextWindows(name, sha256, found[:count].clone())


def _length(subject: Opened, request: TextRequest) -> int:
    """Tokens of a window, no more than the model's positions."""
    limit = subject.positions
    length = request.length if request.length is not None else min(LENGTH, limit or LENGTH)
    if limit is not None and length > limit:
        what = f"windows of {length} tokens, but the model takes {limit}"
        raise CalibrationError(what, subject.name, f"Use --length {limit}")
    if length < 2 or request.windows < 1:
        what = f"{request.windows} windows of {length} tokens predict nothing"
        raise CalibrationError(what, "--windows, --length", "Use at least 1 and 2")
    return length

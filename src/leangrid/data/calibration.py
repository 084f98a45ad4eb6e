"""Makes the calibration windows: consecutive tokens without padding, the same for the same recipe."""

import hashlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from leangrid.data.corpora import read_documents
from leangrid.data.documents import Document, Reading, join_documents
from leangrid.data.hub import PREFIX
from leangrid.data.windows import PictureRows, Windows
from leangrid.errors import CalibrationError
from leangrid.mixture import spread
from leangrid.recipe import Recipe

log = logging.getLogger("leangrid")

Sampler = Callable[[int, int, int], Tensor]  # (samples, length, seed) -> int64 [samples, length]
_CHARACTERS_A_TOKEN = 5  # a first estimate; if it is too low, more text is read
_SLACK = 64  # tokens after the last one used, so that ending the text there cannot change how the used part is merged


@dataclass(frozen=True)
class Affixes:
    """The ids of the special tokens that a tokenizer puts before and after a text.

    ``(bos,)`` and ``()`` for most decoders, [CLS] and [SEP] for BERT."""

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]


def find_affixes(tokenizer: PreTrainedTokenizerBase) -> Affixes:
    """Find what ``tokenizer`` adds around a text, by tokenizing one word with and without special tokens."""
    plain, whole = _ids(tokenizer, "word", special=False), _ids(tokenizer, "word", special=True)
    for start in range(len(whole) - len(plain) + 1):
        if plain and whole[start : start + len(plain)] == plain:
            return Affixes(tuple(whole[:start]), tuple(whole[start + len(plain) :]))
    return Affixes((), ())


def make_windows(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase | None,
    sampler: Sampler | None = None,
    *,
    vocab_rows: int | None = None,
    max_positions: int | None = None,
    reading: Reading | None = None,
    extra: int = 0,
) -> Int64[Tensor, "samples length"]:
    """The calibration windows of ``recipe``: int64 token ids [samples + extra, length].

    From a file: its documents in order, joined by blank lines and tokenized once; the first samples x length tokens, as
    other tools take them. Conversations go through the tokenizer's chat template, one after the other. From C4 and data
    sets of the hub: the same with documents shuffled by the seed. From WikiText-2 and the embedded text: windows of the
    whole corpus, chosen by the seed. From ``self``: ``sampler(samples, length, seed)`` draws them from the model. Of a
    mixture every source gives its own windows so, and they are spread (mixture.py). A
    tokenizer that also closes its texts (BERT's [SEP]) has its special tokens in every window.

    Args:
        tokenizer: of the model; None if it has none, which only ``self`` allows.
        sampler: None for a model that cannot generate text.
        vocab_rows: rows of the model's embedding, to recognise another model's tokenizer; None: not checked.
        max_positions: the longest window that the model takes; None: not checked.
        reading: counts what is read and left out; None: it is not needed.
        extra: how many more windows to add at the end, as far as the corpus has them; none for ``self``; of a mixture
            those of the first source that is read.

    Raises:
        CalibrationError: there is no tokenizer, the text cannot be read or is empty or too short (the message has both
            numbers of tokens), a token is not in the embedding, or a window is too long.
    """
    reading = Reading(recipe.calibration) if reading is None else reading
    if recipe.parts:
        known = {"vocab_rows": vocab_rows, "max_positions": max_positions}
        return _from_parts(recipe, tokenizer, sampler, reading, extra, known)
    if max_positions is not None and recipe.length > max_positions:
        what = f"windows of {recipe.length} tokens, but the model takes {max_positions}"
        raise CalibrationError(what, "--length", f"Use --length {max_positions}")
    if recipe.calibration == "self":
        if recipe.text_field is not None:
            raise CalibrationError(
                "'self' has no columns to choose from", "--text-field", "Give it with a file or hf:org/name"
            )
        if sampler is None:
            what = "this model cannot sample text from itself"
            raise CalibrationError(what, "--calibration self", "Use --calibration c4 or a .txt/.jsonl file")
        result = sampler(recipe.samples, recipe.length, recipe.seed)
    else:
        if tokenizer is None:
            way_out = "Add its tokenizer files, or use --calibration self"
            raise CalibrationError("the checkpoint has no tokenizer", recipe.calibration, way_out)
        result = _from_corpus(recipe, tokenizer, reading, extra)
    check_vocabulary(result, vocab_rows)
    return result


def hash_windows(tokens: Windows) -> str:
    """The sha256, in hex, of the windows as int64 (row-major, little-endian); of rows with pictures, of all tensors."""
    if isinstance(tokens, PictureRows):
        return tokens.sha256()
    return hashlib.sha256(tokens.contiguous().cpu().numpy().astype("<i8").tobytes()).hexdigest()


def decode_start(tokenizer: PreTrainedTokenizerBase, tokens: Windows, characters: int = 160) -> str:
    """The start of the first window as text of at most ``characters`` characters; of the tokens that stand for a
    picture one is shown.

    It lets a person see that tokenizer and corpus belong to the model."""
    if isinstance(tokens, PictureRows):
        ids = torch.unique_consecutive(tokens[0]["input_ids"][0])
    else:
        ids = tokens[0]
    text = tokenizer.decode(ids[:characters].tolist())
    return " ".join(str(text).split())[:characters]


def list_tokenizer_doubts(
    tokenizer: PreTrainedTokenizerBase, config: dict[str, Any], vocab_rows: int | None
) -> list[str]:
    """One sentence for each point in which the tokenizer and config.json disagree; empty if there is none.

    A disagreement is no error, but may mean that the tokenizer belongs to another model."""
    found = []
    if vocab_rows is not None and len(tokenizer) > vocab_rows:
        found.append(f"the tokenizer knows {len(tokenizer):,} tokens, the embedding has {vocab_rows:,} rows")
    for role in ("bos", "eos"):
        stated, own = config.get(f"{role}_token_id"), getattr(tokenizer, f"{role}_token_id", None)
        allowed = stated if isinstance(stated, list) else [stated]
        if stated is not None and own is not None and own not in allowed:
            found.append(f"config.json calls token {stated} its {role}, the tokenizer token {own}")
    return [f"{what}: it may belong to another model" for what in found]


def check_vocabulary(tokens: Tensor, vocab_rows: int | None) -> None:
    """Raise CalibrationError if a token id is not below ``vocab_rows``, the rows of the embedding; None checks nothing.

    Without this check the lookup would read foreign memory or crash."""
    highest = int(tokens.max())
    if vocab_rows is not None and highest >= vocab_rows:
        way_out = "The tokenizer belongs to another model: restore the checkpoint's own"
        raise CalibrationError(f"token {highest} has no row in an embedding of {vocab_rows}", "tokenizer", way_out)


def cut_windows(ids: Sequence[int], length: int, around: Affixes) -> Int64[Tensor, "windows length"]:
    """Cut token ids into consecutive windows of ``length``: int64 [windows, length]. An incomplete last one is dropped.

    If the tokenizer closes its texts (``around.suffix``), each window contains its special tokens at both ends."""
    if not around.suffix:
        count = len(ids) // length
        return torch.tensor(ids[: count * length], dtype=torch.int64).view(count, length)
    inner = length - len(around.prefix) - len(around.suffix)
    if inner < 1:
        raise CalibrationError(
            f"{length} tokens leave no room between the tokenizer's special tokens", "--length", "Use a longer window"
        )
    count = len(ids) // inner
    body = torch.tensor(ids[: count * inner], dtype=torch.int64).view(count, inner)
    left = torch.tensor(around.prefix, dtype=torch.int64).expand(count, -1)
    right = torch.tensor(around.suffix, dtype=torch.int64).expand(count, -1)
    return torch.cat((left, body, right), 1)


def tokenize_text(tokenizer: PreTrainedTokenizerBase, text: str, around: Affixes) -> list[int]:
    """Tokenize one text: with the opening special token, as decoders have it, if ``around`` has no suffix.

    With a suffix, without special tokens: ``cut_windows`` adds them to each window."""
    ids = _ids(tokenizer, text, special=False)
    # A chat template may write the opening token itself.
    is_opened = around.suffix or tuple(ids[: len(around.prefix)]) == around.prefix
    return ids if is_opened else [*around.prefix, *ids]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, special: bool) -> list[int]:
    encoded: Any = tokenizer(text, add_special_tokens=special, verbose=False)
    return list(encoded["input_ids"])


def _from_parts(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase | None,
    sampler: Sampler | None,
    reading: Reading,
    extra: int,
    known: dict[str, int | None],
) -> Tensor:
    parts, unseen = [], []
    read = [part.source for part in recipe.parts if part.source != "self"]
    for part in recipe.parts:
        reading.parts.append(Reading(part.source))
        more = extra if read and part.source == read[0] else 0
        found = make_windows(recipe.of_part(part), tokenizer, sampler, **known, reading=reading.parts[-1], extra=more)
        parts.append(iter(found[: part.windows]))
        unseen += found[part.windows :]
    order = spread(tuple(part.windows for part in recipe.parts))
    return torch.stack([*(next(parts[source]) for source in order), *unseen])


def _from_corpus(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, reading: Reading, extra: int) -> Tensor:
    around = find_affixes(tokenizer)
    name, choose = recipe.calibration, recipe.calibration in ("wikitext2", "embedded")
    seed = recipe.seed if name == "c4" or name.startswith(PREFIX) else None
    found = read_documents(name, seed=seed, column=recipe.text_field, tokenizer=tokenizer, reading=reading)
    needed = recipe.samples * recipe.length
    ids = _first_tokens(found, tokenizer, around, None if choose else needed + extra * recipe.length)
    candidates = cut_windows(ids, recipe.length, around)
    if len(candidates) < recipe.samples:
        whole = len(candidates)
        way_out = f"Use --samples {whole} or more text" if whole else "Use a shorter --length or more text"
        what = f"too little text: {len(ids):,} tokens, {needed:,} needed ({recipe.samples} x {recipe.length})"
        raise CalibrationError("; ".join((what, *reading.list_left_out())), name, way_out)
    if not choose:
        return candidates[: recipe.samples + extra]
    order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(recipe.seed))
    return candidates[order[: recipe.samples + extra]].contiguous()


def _first_tokens(
    found: Iterable[Document], tokenizer: PreTrainedTokenizerBase, around: Affixes, needed: int | None
) -> list[int]:
    """Token ids of the joined documents: all of them for None, else at least ``needed`` if there are as many.

    No more documents are read and tokenized than that takes."""
    if needed is None:
        return tokenize_text(tokenizer, join_documents(found), around)
    source, read, characters = iter(found), [Document("", "")], needed * _CHARACTERS_A_TOKEN
    while True:
        finished = _read_until(source, read, characters)
        # Cut by characters, so that a single huge document is not tokenized completely.
        ids = tokenize_text(tokenizer, join_documents(read)[:characters], around)
        if finished or len(ids) >= needed + _SLACK:
            return ids
        characters = math.ceil(characters * max(1.5, 1.2 * needed / max(len(ids), 1)))


def _read_until(source: Iterator[Document], read: list[Document], characters: int) -> bool:
    """Append documents to ``read`` until they have more than ``characters``; return whether there are no more."""
    size = sum(len(document.text) + len(document.gap) for document in read)
    while size <= characters:
        document = next(source, None)
        if document is None:
            return True
        read.append(document)
        size += len(document.text) + len(document.gap)
    return False

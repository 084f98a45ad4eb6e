"""Calibration windows: real tokens packed back to back, never padded, the same for the same recipe."""

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

from leangrid.data.corpora import documents
from leangrid.data.documents import Document, Reading, joined_text
from leangrid.data.hub import PREFIX
from leangrid.errors import CalibrationError
from leangrid.recipe import Recipe

log = logging.getLogger("leangrid")

Sampler = Callable[[int, int, int], Tensor]  # samples, length, seed -> int64 [samples, length]
_CHARACTERS_A_TOKEN = 5  # a first guess; reading goes on where it was too low
_SLACK = 64  # tokens beyond the last one used, so that cutting the text there cannot change a merge inside


@dataclass(frozen=True)
class Affixes:
    """The special tokens a tokenizer puts around a text: ``(bos,)`` and ``()`` for most decoders, [CLS] and [SEP] for
    BERT."""

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]


def affixes(tokenizer: PreTrainedTokenizerBase) -> Affixes:
    """What ``tokenizer`` adds around any text, found by tokenizing one word with and without."""
    bare, dressed = _ids(tokenizer, "word", special=False), _ids(tokenizer, "word", special=True)
    for start in range(len(dressed) - len(bare) + 1):
        if bare and dressed[start : start + len(bare)] == bare:
            return Affixes(tuple(dressed[:start]), tuple(dressed[start + len(bare) :]))
    return Affixes((), ())


def windows(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase | None,
    sampler: Sampler | None = None,
    *,
    vocab_rows: int | None = None,
    max_positions: int | None = None,
    reading: Reading | None = None,
    extra: int = 0,
) -> Int64[Tensor, "samples length"]:
    """The windows that ``recipe`` asks for.

    A file: its documents in order, joined by blank lines, tokenized once, the first samples x length tokens, so that
    runs compare with other tools; conversations in the tokenizer's chat template, one after the other. C4 and data sets
    of the hub: the same from documents shuffled by the seed. WikiText-2 and the embedded text: all windows of the
    corpus, of which the seed chooses. ``self``: ``sampler(samples, length, seed)`` draws them from the model. A
    tokenizer that closes its texts (BERT's [SEP]) gets its special tokens in every window.

    Args:
        vocab_rows: rows of the model's embedding; a token at or above it is another model's tokenizer.
        max_positions: longest window the model takes.
        reading: grows with what was taken of the corpus and what was left out.
        extra: so many windows more at the end, or as many as the corpus holds; none of ``self``.

    Raises:
        CalibrationError: no tokenizer, text that cannot be read or holds none, too little text (tokens have and need),
            a token beyond the embedding, a window too long.
    """
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
        result = _from_corpus(recipe, tokenizer, Reading(recipe.calibration) if reading is None else reading, extra)
    check_vocabulary(result, vocab_rows)
    return result


def windows_hash(tokens: Int64[Tensor, "samples length"]) -> str:
    """sha256 of the windows' int64 bytes (row-major, little-endian)."""
    return hashlib.sha256(tokens.contiguous().cpu().numpy().astype("<i8").tobytes()).hexdigest()


def decoded_start(
    tokenizer: PreTrainedTokenizerBase, tokens: Int64[Tensor, "samples length"], characters: int = 160
) -> str:
    """The first window as text, for a person to see that tokenizer and corpus belong to the model."""
    text = tokenizer.decode(tokens[0, :characters].tolist())
    return " ".join(str(text).split())[:characters]


def doubts(tokenizer: PreTrainedTokenizerBase, config: dict[str, Any], vocab_rows: int | None) -> list[str]:
    """Where the tokenizer and config.json disagree, one sentence each: no proof, but the first sign of another model's
    tokenizer."""
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
    """CalibrationError where a token has no row in the embedding: the kernel would read another row or crash."""
    highest = int(tokens.max())
    if vocab_rows is not None and highest >= vocab_rows:
        way_out = "The tokenizer belongs to another model: restore the checkpoint's own"
        raise CalibrationError(f"token {highest} has no row in an embedding of {vocab_rows}", "tokenizer", way_out)


def cut(ids: Sequence[int], length: int, around: Affixes) -> Int64[Tensor, "windows length"]:
    """Consecutive windows of ``length`` tokens; the incomplete tail is left out. Closed texts get their special tokens
    in each."""
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


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str, around: Affixes) -> list[int]:
    """One text as ids: with the opening special token of a decoder, bare for a tokenizer whose windows are closed one
    by one."""
    ids = _ids(tokenizer, text, special=False)
    opened = (
        around.suffix or tuple(ids[: len(around.prefix)]) == around.prefix
    )  # a chat template may write the token itself
    return ids if opened else [*around.prefix, *ids]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, special: bool) -> list[int]:
    encoded: Any = tokenizer(text, add_special_tokens=special, verbose=False)
    return list(encoded["input_ids"])


def _from_corpus(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, reading: Reading, extra: int) -> Tensor:
    around = affixes(tokenizer)
    name, choose = recipe.calibration, recipe.calibration in ("wikitext2", "embedded")
    seed = recipe.seed if name == "c4" or name.startswith(PREFIX) else None
    found = documents(name, seed=seed, column=recipe.text_field, tokenizer=tokenizer, reading=reading)
    needed = recipe.samples * recipe.length
    ids = _first_tokens(found, tokenizer, around, None if choose else needed + extra * recipe.length)
    candidates = cut(ids, recipe.length, around)
    if len(candidates) < recipe.samples:
        whole = len(candidates)
        way_out = f"Use --samples {whole} or more text" if whole else "Use a shorter --length or more text"
        what = f"too little text: {len(ids):,} tokens, {needed:,} needed ({recipe.samples} x {recipe.length})"
        raise CalibrationError("; ".join((what, *reading.left_out())), name, way_out)
    if not choose:
        return candidates[: recipe.samples + extra]
    order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(recipe.seed))
    return candidates[order[: recipe.samples + extra]].contiguous()


def _first_tokens(
    found: Iterable[Document], tokenizer: PreTrainedTokenizerBase, around: Affixes, needed: int | None
) -> list[int]:
    """Ids of the joined documents: all of them, or at least ``needed`` where there are so many, read and tokenized no
    further."""
    if needed is None:
        return tokenize(tokenizer, joined_text(found), around)
    source, read, characters = iter(found), [Document("", "")], needed * _CHARACTERS_A_TOKEN
    while True:
        finished = _read_until(source, read, characters)
        ids = tokenize(
            tokenizer, joined_text(read)[:characters], around
        )  # a single giant document is not tokenized whole
        if finished or len(ids) >= needed + _SLACK:
            return ids
        characters = math.ceil(characters * max(1.5, 1.2 * needed / max(len(ids), 1)))


def _read_until(source: Iterator[Document], read: list[Document], characters: int) -> bool:
    """Let ``read`` grow by whole documents beyond ``characters``; whether the documents came to an end."""
    size = sum(len(document.text) + len(document.gap) for document in read)
    while size <= characters:
        document = next(source, None)
        if document is None:
            return True
        read.append(document)
        size += len(document.text) + len(document.gap)
    return False

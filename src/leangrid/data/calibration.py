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

from leangrid.data.corpora import texts
from leangrid.errors import CalibrationError
from leangrid.recipe import Recipe

log = logging.getLogger("leangrid")

Sampler = Callable[[int, int, int], Tensor]  # samples, length, seed -> int64 [samples, length]
_CHARACTERS_A_TOKEN = 5  # a first guess; reading goes on where it was too low
_SLACK = 64  # tokens beyond the last one used, so that cutting the text there cannot change a merge inside


@dataclass(frozen=True)
class Affixes:
    """The special tokens a tokenizer puts around a text: ``(bos,)`` and ``()`` for most decoders, [CLS] and [SEP] for BERT."""

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
) -> Int64[Tensor, "samples length"]:
    """The windows that ``recipe`` asks for.

    A file: its documents in order, joined by blank lines, tokenized once, the first samples x length tokens, so that runs
    compare with other tools. C4: the same from documents shuffled by the seed. WikiText-2 and the embedded text: all
    windows of the corpus, of which the seed chooses. ``self``: ``sampler(samples, length, seed)`` draws them from the model.
    A tokenizer that closes its texts (BERT's [SEP]) gets its special tokens in every window.

    Args:
        vocab_rows: rows of the model's embedding; a token at or above it is another model's tokenizer.
        max_positions: longest window the model takes.

    Raises:
        CalibrationError: no tokenizer, too little text (tokens have and need), a token beyond the embedding, a window too long.
    """
    if max_positions is not None and recipe.length > max_positions:
        what = f"windows of {recipe.length} tokens, but the model takes {max_positions}"
        raise CalibrationError(what, "--length", f"Use --length {max_positions}")
    if recipe.calibration == "self":
        if sampler is None:
            what = "this model cannot sample text from itself"
            raise CalibrationError(what, "--calibration self", "Use --calibration c4 or a .txt/.jsonl file")
        result = sampler(recipe.samples, recipe.length, recipe.seed)
    else:
        if tokenizer is None:
            way_out = "Add its tokenizer files, or use --calibration self"
            raise CalibrationError("the checkpoint has no tokenizer", recipe.calibration, way_out)
        result = _from_corpus(recipe, tokenizer)
    check_vocabulary(result, vocab_rows)
    return result


def windows_hash(tokens: Int64[Tensor, "samples length"]) -> str:
    """sha256 of the windows' int64 bytes (row-major, little-endian)."""
    return hashlib.sha256(tokens.contiguous().cpu().numpy().astype("<i8").tobytes()).hexdigest()


def decoded_start(tokenizer: PreTrainedTokenizerBase, tokens: Int64[Tensor, "samples length"], characters: int = 160) -> str:
    """The first window as text, for a person to see that tokenizer and corpus belong to the model."""
    text = tokenizer.decode(tokens[0, :characters].tolist())
    return " ".join(str(text).split())[:characters]


def doubts(tokenizer: PreTrainedTokenizerBase, config: dict[str, Any], vocab_rows: int | None) -> list[str]:
    """Where the tokenizer and config.json disagree, one sentence each: no proof, but the first sign of another model's tokenizer."""
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
    """Consecutive windows of ``length`` tokens; the incomplete tail is left out. Closed texts get their special tokens in each."""
    if not around.suffix:
        count = len(ids) // length
        return torch.tensor(ids[: count * length], dtype=torch.int64).view(count, length)
    inner = length - len(around.prefix) - len(around.suffix)
    if inner < 1:
        raise CalibrationError(f"{length} tokens leave no room between the tokenizer's special tokens", "--length", "Use a longer window")
    count = len(ids) // inner
    body = torch.tensor(ids[: count * inner], dtype=torch.int64).view(count, inner)
    left = torch.tensor(around.prefix, dtype=torch.int64).expand(count, -1)
    right = torch.tensor(around.suffix, dtype=torch.int64).expand(count, -1)
    return torch.cat((left, body, right), 1)


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str, around: Affixes) -> list[int]:
    """One text as ids: with the opening special token of a decoder, bare for a tokenizer whose windows are closed one by one."""
    ids = _ids(tokenizer, text, special=False)
    return ids if around.suffix else [*around.prefix, *ids]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, special: bool) -> list[int]:
    encoded: Any = tokenizer(text, add_special_tokens=special, verbose=False)
    return list(encoded["input_ids"])


def _from_corpus(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    around = affixes(tokenizer)
    name, choose = recipe.calibration, recipe.calibration in ("wikitext2", "embedded")
    documents = texts(name, seed=recipe.seed if name == "c4" else None)
    needed = recipe.samples * recipe.length
    ids = _first_tokens(documents, tokenizer, around, None if choose else needed)
    candidates = cut(ids, recipe.length, around)
    if len(candidates) < recipe.samples:
        whole = len(candidates)
        way_out = f"Use --samples {whole} or more text" if whole else "Use a shorter --length or more text"
        what = f"too little text: {len(ids):,} tokens, {needed:,} needed ({recipe.samples} x {recipe.length})"
        raise CalibrationError(what, name, way_out)
    if not choose:
        return candidates[: recipe.samples]
    order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(recipe.seed))
    return candidates[order[: recipe.samples]].contiguous()


def _first_tokens(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, around: Affixes, needed: int | None) -> list[int]:
    """Ids of the joined documents: all of them, or at least ``needed`` where there are so many, read and tokenized no further."""
    if needed is None:
        return tokenize(tokenizer, "\n\n".join(documents), around)
    source, text, characters = iter(documents), "", needed * _CHARACTERS_A_TOKEN
    while True:
        text, finished = _read_until(source, text, characters)
        ids = tokenize(tokenizer, text[:characters], around)  # a single giant document is not tokenized whole
        if finished or len(ids) >= needed + _SLACK:
            return ids
        characters = math.ceil(characters * max(1.5, 1.2 * needed / max(len(ids), 1)))


def _read_until(source: Iterator[str], text: str, characters: int) -> tuple[str, bool]:
    """``text`` grown by whole documents beyond ``characters``, and whether the documents came to an end."""
    parts, size = [text] if text else [], len(text)
    while size <= characters:
        document = next(source, None)
        if document is None:
            return "\n\n".join(parts), True
        parts.append(document)
        size += len(document) + 2
    return "\n\n".join(parts), False

"""Tokenizers as llama.cpp's fields: pre-tokenizers by name, SentencePiece's scores, refusal of what has no name."""

import itertools
import json
from pathlib import Path

import pytest
import transformers as hf
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

import tiny_models
from leangrid.errors import CheckpointError
from leangrid.models import gguf
from leangrid.models.gguf_vocab import _LLAMA3, _QWEN2, split_by_name, vocabulary

SPACE = "\u2581"
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
PLAIN = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def split(pattern: str) -> pre_tokenizers.Split:
    from tokenizers import Regex

    return pre_tokenizers.Split(Regex(pattern), "isolated")


def byte_level(pre: pre_tokenizers.PreTokenizer, ignore_merges: bool = False, normalizer: normalizers.Normalizer | None = None):
    """The tiny models' BPE behind another pre-tokenizer."""
    described = json.loads(tiny_models.tokenizer().backend_tokenizer.to_str())
    described["model"]["ignore_merges"] = ignore_merges
    made = Tokenizer.from_str(json.dumps(described))
    made.pre_tokenizer = pre
    if normalizer is not None:
        made.normalizer = normalizer
    return hf.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<bos>", eos_token="<eos>")


@pytest.mark.parametrize(
    ("tokenizer", "name"),
    [
        (lambda: byte_level(BYTES), "gpt-2"),
        (lambda: byte_level(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES])), "smollm"),
        (lambda: byte_level(pre_tokenizers.Sequence([split(_LLAMA3), PLAIN]), ignore_merges=True), "llama-bpe"),
        (lambda: byte_level(pre_tokenizers.Sequence([split(_LLAMA3), PLAIN])), "smaug-bpe"),
        (lambda: byte_level(pre_tokenizers.Sequence([split(_QWEN2), PLAIN]), normalizer=normalizers.NFC()), "qwen2"),
        (lambda: byte_level(pre_tokenizers.Sequence([split(_QWEN2), PLAIN])), "qwen2"),
    ],
)
def test_pre_tokenizers_by_name(tokenizer, name: str) -> None:
    fields, notices = vocabulary(tokenizer(), tiny_models.VOCAB)
    assert fields["tokenizer.ggml.pre"].value == name and notices == []


@pytest.mark.parametrize(
    "tokenizer",
    [
        lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)),
        lambda: byte_level(PLAIN),
        lambda: byte_level(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=False), BYTES])),
        lambda: byte_level(pre_tokenizers.Sequence([split(r"\w+"), PLAIN])),
        lambda: byte_level(BYTES, normalizer=normalizers.Lowercase()),
        lambda: byte_level(pre_tokenizers.Whitespace()),
        lambda: byte_level(BYTES, ignore_merges=True),
        lambda: hf.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))),
        lambda: hf.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram([("a", 0.0)], 0))),
    ],
)
def test_an_unknown_one_is_refused_with_the_way_out(tokenizer) -> None:
    with pytest.raises(CheckpointError, match=r"no name for this tokenizer.*--like FILE\.gguf"):
        vocabulary(tokenizer(), tiny_models.VOCAB)


def test_ids_beside_and_behind_the_tokens() -> None:
    tokenizer = byte_level(BYTES)
    tokenizer.add_tokens([" two  spaces"])
    fields, notices = vocabulary(tokenizer, tiny_models.VOCAB + 3)
    tokens, types = fields["tokenizer.ggml.tokens"].value, fields["tokenizer.ggml.token_type"].value
    assert tokens[tiny_models.VOCAB :] == [" two  spaces", f"[PAD{tiny_models.VOCAB + 1}]", f"[PAD{tiny_models.VOCAB + 2}]"]
    assert types[tiny_models.VOCAB :] == [4, 5, 5] and types[:5] == [3, 3, 3, 3, 1] and notices == []
    fields, notices = vocabulary(tokenizer, tiny_models.VOCAB)
    assert len(fields["tokenizer.ggml.tokens"].value) == tiny_models.VOCAB and "1 tokens" in notices[0]


WORDS = ["▁the", "▁th", "th", "he", "the", "▁t", "re", "▁re", "er", "▁a", "ther", "▁ther", "in", "ing", "▁in"]
PAIRS = [("t", "h"), ("h", "e"), ("▁", "t"), ("▁t", "h"), ("▁", "th"), ("▁th", "e"), ("▁t", "he"), ("th", "e"), ("t", "he"), ("e", "r"),
         ("r", "e"), ("▁", "re"), ("▁", "a"), ("th", "er"), ("the", "r"), ("▁", "ther"), ("▁the", "r"), ("▁th", "er"), ("i", "n"),
         ("in", "g"), ("▁", "in")]  # fmt: skip


def sentencepiece(pre=None, normalizer=None):
    letters = [SPACE, *"abcdefghijklmnopqrstuvwxyz"]
    vocab = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *letters, *WORDS]
    bpe = models.BPE({token: i for i, token in enumerate(vocab)}, PAIRS, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    made = Tokenizer(bpe)
    made.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    if pre is not None:
        made.pre_tokenizer = pre
    if normalizer is not None:
        made.normalizer = normalizer
    return hf.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>"), len(vocab)


LLAMA2 = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])


@pytest.mark.parametrize(
    ("pre", "normalizer", "space", "told"),
    [
        (None, LLAMA2, True, 0),
        (None, normalizers.Replace(" ", SPACE), False, 0),
        (pre_tokenizers.Split(" ", "merged_with_previous"), normalizers.Replace(" ", SPACE), False, 0),
        (pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False), None, True, 1),
        (pre_tokenizers.Metaspace(SPACE, prepend_scheme="never", split=False), None, False, 0),
    ],
)
def test_sentencepiece_fields(pre, normalizer, space: bool, told: int) -> None:
    tokenizer, size = sentencepiece(pre, normalizer)
    fields, notices = vocabulary(tokenizer, size)
    assert fields["tokenizer.ggml.model"].value == "llama" and fields["tokenizer.ggml.add_space_prefix"].value is space
    assert fields["tokenizer.ggml.token_type"].value[:4] == [2, 3, 3, 6] and len(notices) == told
    assert "tokenizer.ggml.merges" not in fields


@pytest.mark.parametrize("text", ["the other thing", "there rethe hether", "in the inn", "ing ther", "athe re er"])
def test_scores_join_as_the_merges_do(text: str) -> None:
    """llama.cpp's SentencePiece algorithm, from the scores alone: always the pair with the highest score, the leftmost of equals."""
    tokenizer, size = sentencepiece(None, LLAMA2)
    fields, _ = vocabulary(tokenizer, size)
    score = dict(zip(fields["tokenizer.ggml.tokens"].value, fields["tokenizer.ggml.scores"].value, strict=True))
    pieces: list[str] = list(SPACE + text.replace(" ", SPACE))
    while True:
        joins = [(-score[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(pieces)) if a + b in score]
        if not joins:
            break
        _, at = min(joins)
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    assert pieces == tokenizer.tokenize(text)


@pytest.mark.parametrize("name", ["gpt-2", "smollm"])
def test_a_rule_taken_by_its_name_has_that_name_again(name: str) -> None:
    tokenizer = byte_level(BYTES)
    split_by_name(tokenizer, name)
    assert vocabulary(tokenizer, tiny_models.VOCAB)[0]["tokenizer.ggml.pre"].value == name


def test_words_of_the_vocabulary_stay_whole_where_llama_cpp_keeps_them() -> None:
    tokenizer = byte_level(pre_tokenizers.Sequence([split(_LLAMA3), PLAIN]))  # as transformers reads such a file
    split_by_name(tokenizer, "llama-bpe")
    assert vocabulary(tokenizer, tiny_models.VOCAB)[0]["tokenizer.ggml.pre"].value == "llama-bpe"


def test_a_rule_that_nobody_here_knows_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"rule 'deepseek-llm'.*SOURCE"):
        split_by_name(byte_level(BYTES), "deepseek-llm")


@pytest.mark.slow
def test_the_demo_models_file_splits_digits_one_by_one() -> None:
    path = next(Path(".models/smollm2").glob("*.gguf"))
    tokenizer = gguf._tokenizer(path, gguf._said(path))
    assert tokenizer.tokenize("in   1984") == ["in", "ĠĠĠ", "1", "9", "8", "4"]  # GPT-2's rule alone: ĠĠ, Ġ

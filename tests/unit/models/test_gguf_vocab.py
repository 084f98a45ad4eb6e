"""Tokenizers as llama.cpp's fields: pre-tokenizers by name, SentencePiece's scores, refusal of what has no name."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import transformers as hf
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from leangrid.errors import CheckpointError
from leangrid.models.gguf_tokenizer import check_tokenizer, tokenizer_of
from leangrid.models.gguf_vocab import LLAMA3, QWEN2, tokenizer_fields
from leangrid.storage.gguf import Field
from leangrid.storage.gguf_header import Header, read_header

SPACE = "\u2581"
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
PLAIN = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def split(pattern: str) -> pre_tokenizers.Split:
    from tokenizers import Regex

    return pre_tokenizers.Split(Regex(pattern), "isolated")


def byte_level(
    pre: pre_tokenizers.PreTokenizer, ignore_merges: bool = False, normalizer: normalizers.Normalizer | None = None
):
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
        (lambda: byte_level(pre_tokenizers.Sequence([split(LLAMA3), PLAIN]), ignore_merges=True), "llama-bpe"),
        (lambda: byte_level(pre_tokenizers.Sequence([split(LLAMA3), PLAIN])), "smaug-bpe"),
        (lambda: byte_level(pre_tokenizers.Sequence([split(QWEN2), PLAIN]), normalizer=normalizers.NFC()), "qwen2"),
        (lambda: byte_level(pre_tokenizers.Sequence([split(QWEN2), PLAIN])), "qwen2"),
    ],
)
def test_pre_tokenizers_by_name(tokenizer, name: str) -> None:
    fields, notices = tokenizer_fields(tokenizer(), tiny_models.VOCAB)
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
        lambda: hf.PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
        ),
        lambda: hf.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram([("a", 0.0)], 0))),
    ],
)
def test_an_unknown_one_is_refused_with_the_way_out(tokenizer) -> None:
    with pytest.raises(CheckpointError, match=r"no name for this tokenizer.*--like FILE\.gguf"):
        tokenizer_fields(tokenizer(), tiny_models.VOCAB)


def test_ids_beside_and_behind_the_tokens() -> None:
    tokenizer = byte_level(BYTES)
    tokenizer.add_tokens([" two  spaces"])
    fields, notices = tokenizer_fields(tokenizer, tiny_models.VOCAB + 3)
    tokens, types = fields["tokenizer.ggml.tokens"].value, fields["tokenizer.ggml.token_type"].value
    assert tokens[tiny_models.VOCAB :] == [
        " two  spaces",
        f"[PAD{tiny_models.VOCAB + 1}]",
        f"[PAD{tiny_models.VOCAB + 2}]",
    ]
    assert types[tiny_models.VOCAB :] == [4, 5, 5] and types[:5] == [3, 3, 3, 3, 1] and notices == []
    fields, notices = tokenizer_fields(tokenizer, tiny_models.VOCAB)
    assert len(fields["tokenizer.ggml.tokens"].value) == tiny_models.VOCAB and "1 tokens" in notices[0]


WORDS = ["▁the", "▁th", "th", "he", "the", "▁t", "re", "▁re", "er", "▁a", "ther", "▁ther", "in", "ing", "▁in"]
PAIRS = [
    ("t", "h"),
    ("h", "e"),
    ("▁", "t"),
    ("▁t", "h"),
    ("▁", "th"),
    ("▁th", "e"),
    ("▁t", "he"),
    ("th", "e"),
    ("t", "he"),
    ("e", "r"),
    ("r", "e"),
    ("▁", "re"),
    ("▁", "a"),
    ("th", "er"),
    ("the", "r"),
    ("▁", "ther"),
    ("▁the", "r"),
    ("▁th", "er"),
    ("i", "n"),
    ("in", "g"),
    ("▁", "in"),
]


def sentencepiece(pre=None, normalizer=None):
    letters = [SPACE, *"abcdefghijklmnopqrstuvwxyz"]
    vocab = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *letters, *WORDS]
    bpe = models.BPE(
        {token: i for i, token in enumerate(vocab)}, PAIRS, unk_token="<unk>", byte_fallback=True, fuse_unk=True
    )
    made = Tokenizer(bpe)
    made.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    if pre is not None:
        made.pre_tokenizer = pre
    if normalizer is not None:
        made.normalizer = normalizer
    return hf.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>"), len(
        vocab
    )


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
    fields, notices = tokenizer_fields(tokenizer, size)
    assert fields["tokenizer.ggml.model"].value == "llama" and fields["tokenizer.ggml.add_space_prefix"].value is space
    assert fields["tokenizer.ggml.token_type"].value[:4] == [2, 3, 3, 6] and len(notices) == told
    assert "tokenizer.ggml.merges" not in fields


@pytest.mark.parametrize("text", ["the other thing", "there rethe hether", "in the inn", "ing ther", "athe re er"])
def test_scores_join_as_the_merges_do(text: str) -> None:
    """llama.cpp's SentencePiece algorithm, from the scores alone: always the pair with the highest score, the leftmost
    of equals."""
    tokenizer, size = sentencepiece(None, LLAMA2)
    fields, _ = tokenizer_fields(tokenizer, size)
    score = dict(zip(fields["tokenizer.ggml.tokens"].value, fields["tokenizer.ggml.scores"].value, strict=True))
    pieces: list[str] = list(SPACE + text.replace(" ", SPACE))
    while True:
        joins = [(-score[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(pieces)) if a + b in score]
        if not joins:
            break
        _, at = min(joins)
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    assert pieces == tokenizer.tokenize(text)


SAMPLES = (
    "the other thing",
    "there  rethe\nhether 1984 it's",
    " in the inn",
    "ÄÖ 東京 🙂",
    "",
    "<bos>the<eos> x",
    "a\t\tb   c",
)


def back(tokenizer, rows: int, **changes: object) -> Any:
    """The tokenizer through the fields of a GGUF file and back."""
    fields, _ = tokenizer_fields(tokenizer, rows)
    given = {key.replace("__", "."): Field("any", value) for key, value in changes.items()}
    header = Header(
        Path("m.gguf"), {key: field for key, field in (fields | given).items() if field.value is not None}, {}
    )
    check_tokenizer(header, rows)
    made = tokenizer_of(header)
    assert made is not None
    return made


@pytest.mark.fault("S15")
@pytest.mark.parametrize(
    "made",
    [
        lambda: byte_level(BYTES),
        lambda: byte_level(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES])),
        lambda: byte_level(pre_tokenizers.Sequence([split(LLAMA3), PLAIN]), ignore_merges=True),
        lambda: byte_level(pre_tokenizers.Sequence([split(LLAMA3), PLAIN])),
        lambda: byte_level(pre_tokenizers.Sequence([split(QWEN2), PLAIN]), normalizer=normalizers.NFC()),
    ],
)
def test_a_byte_level_tokenizer_comes_back(made) -> None:
    tokenizer = made()
    tokenizer.add_tokens([" two  spaces"])
    tokenizer.chat_template = "{{ messages }}"
    found = back(tokenizer, len(tokenizer))
    for text in (*SAMPLES, "with two  spaces inside"):
        assert found(text)["input_ids"] == tokenizer(text)["input_ids"], text
        assert found.decode(found(text)["input_ids"]) == tokenizer.decode(tokenizer(text)["input_ids"])
    assert (found.bos_token_id, found.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert (
        found.chat_template == tokenizer.chat_template
        and tokenizer_fields(found, len(found))[0] == tokenizer_fields(tokenizer, len(tokenizer))[0]
    )


@pytest.mark.fault("S15")
@pytest.mark.parametrize("normalizer", [LLAMA2, normalizers.Replace(" ", SPACE)])
def test_a_sentencepiece_tokenizer_comes_back(normalizer, tmp_path: Path) -> None:
    tokenizer, size = sentencepiece(None, normalizer)
    found = back(tokenizer, size)
    found.save_pretrained(tmp_path)
    for read in (found, hf.AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)):
        for text in SAMPLES:
            assert read(text)["input_ids"] == tokenizer(text)["input_ids"], text
        assert read.decode(read("the thing")["input_ids"]).strip() == "the thing"


@pytest.mark.fault("S15")
def test_what_is_put_around_a_text_is_carried(tmp_path: Path) -> None:
    tokenizer = byte_level(BYTES)
    plain = tokenizer("the thing")["input_ids"]
    for first, last in ((True, False), (False, True), (True, True), (False, False)):
        found = back(
            tokenizer, len(tokenizer), tokenizer__ggml__add_bos_token=first, tokenizer__ggml__add_eos_token=last
        )
        found.save_pretrained(tmp_path)
        for read in (found, hf.AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)):
            assert (
                read("the thing")["input_ids"]
                == [tokenizer.bos_token_id] * first + plain + [tokenizer.eos_token_id] * last
            )
    unsaid = {"tokenizer__ggml__add_bos_token": None, "tokenizer__ggml__pre": "llama-bpe"}
    assert (
        back(tokenizer, len(tokenizer), **unsaid)("the")["input_ids"][0] == tokenizer.bos_token_id
    )  # llama.cpp's default for it


@pytest.mark.fault("S15")
def test_a_rule_that_nobody_here_knows_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"rule 'deepseek-llm'.*SOURCE"):
        back(byte_level(BYTES), tiny_models.VOCAB, tokenizer__ggml__pre="deepseek-llm")
    with pytest.raises(CheckpointError, match=r"512 tokens, and the model 500 embeddings"):
        check_tokenizer(Header(Path("m"), tokenizer_fields(byte_level(BYTES), tiny_models.VOCAB)[0], {}), 500)


@pytest.mark.slow
def test_the_demo_models_file_splits_digits_one_by_one() -> None:
    path = next(Path(".models/smollm2").glob("*.gguf"))
    tokenizer = tokenizer_of(read_header(path))
    assert tokenizer is not None
    assert tokenizer.tokenize("in   1984") == ["in", "ĠĠĠ", "1", "9", "8", "4"]  # GPT-2's rule alone: ĠĠ, Ġ

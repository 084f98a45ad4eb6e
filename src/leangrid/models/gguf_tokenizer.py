"""Builds a tokenizer from the header of a GGUF file; gguf_vocab.py does the reverse.

transformers' own conversion differs between releases and loses the space prefix, ids and rules without a warning, and
its loader reads the files beside the GGUF file, which may name code. So the tokenizer is built here from the parts of
the tokenizers library."""

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from leangrid.errors import CheckpointError
from leangrid.models.gguf_vocab import (
    CONTROL,
    DIGITS,
    GPT2,
    LLAMA3,
    NORMAL,
    QWEN2,
    SPACE,
    TEKKEN,
    UNKNOWN,
    USER_DEFINED,
    WHOLE,
)
from leangrid.storage.gguf_header import Header

_GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# llama-vocab.cpp's names of rules that split text by one regular expression.
_EXPRESSIONS = {
    **dict.fromkeys(WHOLE - {"tekken"}, LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe"), LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez"), QWEN2),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2"), _GPT4O),
    "tekken": TEKKEN,
}
_UNNAMED = ("default", "")  # files of before May 2024
_NONE = ("none", "no_vocab")
_WAY_OUT = "Take the model's own checkpoint (safetensors and tokenizer.json) as SOURCE"
_SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def check_tokenizer(header: Header, rows: int) -> None:
    """Raise CheckpointError for a tokenizer that ``tokenizer_of`` cannot build: one of an unknown kind or rule, with
    more tokens than the model has embeddings (``rows``), or with lists of different lengths."""
    kind = header.value("tokenizer.ggml.model")
    if kind is None or kind in _NONE:
        return
    if kind not in ("llama", "gpt2"):
        raise _refused(
            header, f"its tokenizer is of the kind {kind!r}, and leangrid builds llama (SentencePiece's BPE) and gpt2"
        )
    tokens = header.value("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens[:1]) or not tokens:
        raise _refused(header, "its list of tokens is missing")
    if len(tokens) > rows:
        raise _refused(header, f"it has {len(tokens)} tokens, and the model {rows} embeddings")
    if len(set(tokens)) != len(tokens):
        raise _refused(header, f"{len(tokens) - len(set(tokens))} of its tokens have the text of another")
    needed = "merges" if kind == "gpt2" else "scores"
    for name in (needed, "token_type"):
        found = header.value(f"tokenizer.ggml.{name}")
        if found is None and name == needed:
            raise _refused(header, f"its tokenizer.ggml.{name} is missing")
        if found is not None and (not isinstance(found, list) or (name != "merges" and len(found) != len(tokens))):
            raise _refused(header, f"its tokenizer.ggml.{name} is not one value a token")
    rule = header.value("tokenizer.ggml.pre", "")
    if kind == "gpt2" and rule not in (*_EXPRESSIONS, *GPT2, *DIGITS, *_UNNAMED):
        raise _refused(header, f"its tokenizer splits text by the rule {rule!r}, which leangrid cannot rebuild")
    for name in _SPECIAL.values():
        number = header.value(f"tokenizer.ggml.{name}")
        if number is not None and not (isinstance(number, int) and 0 <= number < len(tokens)):
            raise _refused(header, f"its tokenizer.ggml.{name} is {number}, and there are {len(tokens)} tokens")


def tokenizer_of(header: Header) -> PreTrainedTokenizerBase | None:
    """Build the tokenizer of a header that ``check_tokenizer`` accepted; None where the file has none."""
    kind, tokens = header.value("tokenizer.ggml.model"), header.value("tokenizer.ggml.tokens")
    if kind is None or kind in _NONE:
        return None
    types = header.value("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    backend = _sentencepiece(header, tokens, types) if kind == "llama" else _byte_level(header, tokens)
    backend.add_special_tokens(
        [_added(t, True) for t, number in zip(tokens, types, strict=True) if number in (CONTROL, UNKNOWN)]
    )
    backend.add_tokens([_added(t, False) for t, number in zip(tokens, types, strict=True) if number == USER_DEFINED])
    special = {name: tokens[number] for name, key in _SPECIAL.items()
               if (number := header.value(f"tokenizer.ggml.{key}")) is not None}  # fmt: skip
    around = {"bos_token": _adds(header, "bos", kind == "llama" or _rule(header) in WHOLE),
              "eos_token": _adds(header, "eos", False)}  # fmt: skip
    first, last = ([special[name]] if adds and name in special else [] for name, adds in around.items())
    used = [(text, tokens.index(text)) for text in dict.fromkeys(first + last)]
    if used:
        backend.post_processor = processors.TemplateProcessing(
            single=[*first, "$A", *last], pair=[*first, "$A", *last, *[f"{text}:1" for text in first], "$B:1",
                                                *[f"{text}:1" for text in last]], special_tokens=used)  # fmt: skip
    else:
        backend.post_processor = processors.ByteLevel(trim_offsets=False) if kind == "gpt2" else processors.Sequence([])
    arch = header.value("general.architecture")
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=header.value(f"{arch}.context_length", 1 << 30),
        clean_up_tokenization_spaces=False,
        **special,
    )
    template = _template(header)
    if template:
        made.chat_template = template
    return made


def special_ids(header: Header) -> dict[str, int | None]:
    """bos_token_id, eos_token_id and pad_token_id for config.json; None for those that the file does not name."""
    keys = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    return {name: header.value(f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()}


def generation_config(header: Header) -> dict[str, Any]:
    """generation_config.json: the special tokens, and all tokens that end an answer; llama.cpp also stops at the end of
    a turn."""
    ids = special_ids(header)
    ends = [ids["eos_token_id"], *(header.value(f"tokenizer.ggml.{key}_token_id") for key in ("eot", "eom"))]
    ends = list(dict.fromkeys(number for number in ends if isinstance(number, int)))
    found = {**ids, "eos_token_id": ends if len(ends) > 1 else ids["eos_token_id"]}
    return {key: value for key, value in found.items() if value is not None}


def _refused(header: Header, problem: str) -> CheckpointError:
    return CheckpointError(f"the GGUF file's tokenizer cannot be built: {problem}", header.file, _WAY_OUT)


def _added(text: str, special: bool) -> AddedToken:
    return AddedToken(text, special=special, normalized=False)


def _adds(header: Header, which: str, default: bool) -> bool:
    return bool(header.value(f"tokenizer.ggml.add_{which}_token", default))


def _rule(header: Header) -> str:
    """The name of the rule by which text is split before BPE. Files of before May 2024 have none; the rule is then that
    of the model's own tokenizer."""
    rule = header.value("tokenizer.ggml.pre", "")
    if rule not in _UNNAMED:
        return rule
    if str(header.value("general.architecture")).startswith("qwen"):
        return "qwen2"
    return "llama-bpe" if "<|begin_of_text|>" in header.value("tokenizer.ggml.tokens") else "gpt-2"


def _byte_level(header: Header, tokens: list[str]) -> Tokenizer:
    """Byte-level BPE on text split by the rule that the header names."""
    rule = _rule(header)
    merges = [tuple(text.split(" ", 1)) for text in header.value("tokenizer.ggml.merges")]
    vocab = {text: number for number, text in enumerate(tokens)}
    # Merges of old files may name tokens that a faulty converter dropped, for which the library would refuse them all.
    usable: list[Any] = [
        pair for pair in merges if len(pair) == 2 and all(part in vocab for part in (*pair, "".join(pair)))
    ]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=usable, ignore_merges=rule in WHOLE))
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if rule in _EXPRESSIONS:
        split = pre_tokenizers.Split(Regex(_EXPRESSIONS[rule]), behavior="isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, plain])
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if rule in DIGITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if rule == "qwen2":
        backend.normalizer = normalizers.NFC()  # what Qwen's own tokenizer does first
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(header: Header, tokens: list[str], types: list[int]) -> Tokenizer:
    """SentencePiece's BPE, whose merges follow from the scores; text that is not in the vocabulary becomes bytes."""
    vocab = {text: number for number, text in enumerate(tokens)}
    scores = header.value("tokenizer.ggml.scores")
    unknown = header.value("tokenizer.ggml.unknown_token_id")
    backend = Tokenizer(models.BPE(vocab=vocab, merges=_merges(vocab, scores, types), byte_fallback=True, fuse_unk=True,
                                   unk_token=None if unknown is None else tokens[unknown]))  # fmt: skip
    prefix = bool(header.value("tokenizer.ggml.add_space_prefix", True))
    spaces = normalizers.Replace(" ", SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces] if prefix else [spaces])
    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return backend


def _merges(vocab: dict[str, int], scores: list[float], types: list[int]) -> list[Any]:
    """All pairs of tokens that join to a token, in order of its falling score, then of its id."""
    found = []
    for text, number in vocab.items():
        if types[number] != NORMAL:
            continue
        pairs = ((text[:cut], text[cut:]) for cut in range(1, len(text)))
        known = [(vocab[left], vocab[right], left, right) for left, right in pairs if left in vocab and right in vocab]
        found += [(-scores[number], number, *pair) for pair in sorted(known)]
    return [(left, right) for *_, left, right in sorted(found, key=lambda item: item[:2])]


def _template(header: Header) -> Any:
    """The chat template; a dict of all by name where the file has several; None where it has none."""
    default, names = header.value("tokenizer.chat_template"), header.value("tokenizer.chat_templates")
    named = {name: header.value(f"tokenizer.chat_template.{name}") for name in names or [] if isinstance(name, str)}
    found = {name: text for name, text in ({"default": default} | named).items() if isinstance(text, str) and text}
    return found if len(found) > 1 else found.get("default")

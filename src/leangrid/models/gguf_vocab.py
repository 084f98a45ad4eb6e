"""A tokenizer as llama.cpp's header fields, from the JSON of the tokenizers library (tokenizer.json).

llama.cpp knows a pre-tokenizer by name only; each name is a fixed rule in its source (llama-vocab.cpp). A tokenizer
whose rule is none of those is refused: a similar rule would give other tokens, and a worse model without a warning."""

import json
from typing import Any

from transformers import PreTrainedTokenizerBase

from leangrid.errors import CheckpointError
from leangrid.storage.gguf import Field

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # llama_token_type
SPACE = "\u2581"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# (splits before the byte level, whether the byte level splits by GPT-2's rule, whether a word of the vocabulary skips
# the merges) -> llama.cpp's name
_PRE: dict[tuple[tuple[str, ...], bool, bool], str] = {
    ((), True, False): "gpt-2",
    (("digits",), True, False): "smollm",
    ((LLAMA3,), False, True): "llama-bpe",
    ((LLAMA3,), False, False): "smaug-bpe",
    ((QWEN2,), False, False): "qwen2",
    ((TEKKEN,), False, True): "tekken",
}
# Further names in llama-vocab.cpp. DIGITS: digits apart, then GPT-2's rule. GPT2: GPT-2's rule. WHOLE: words of the
# vocabulary skip the merges.
DIGITS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"}
GPT2 = {
    "gpt-2",
    "phi-2",
    "jina-es",
    "jina-de",
    "jina-v2-es",
    "jina-v2-de",
    "jina-v1-en",
    "jina-v2-code",
    "roberta-bpe",
    "gigachat",
    "a.x-4.0",
    "mellum",
    "modern-bert",
    "mpt",
    "olmo",
    "jais",
    "trillion",
    "granite-docling",
    "exaone4",
}
WHOLE = {
    "llama-bpe",
    "llama3",
    "llama-v3",
    "falcon3",
    "falcon-h1",
    "pixtral",
    "midm-2.0",
    "lfm2",
    "jina-v5-nano",
    "tekken",
}
_WAY_OUT = "Take tokenizer and metadata from a file of the same model: --like FILE.gguf"


def tokenizer_fields(tokenizer: PreTrainedTokenizerBase, rows: int) -> tuple[dict[str, Field], list[str]]:
    """The header fields of a tokenizer for a model with ``rows`` embeddings, and notices for the user.

    Raises:
        CheckpointError: llama.cpp has no name for this tokenizer.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise CheckpointError(f"{type(tokenizer).__name__} has no fast tokenizer to read", "tokenizer", _WAY_OUT)
    described = json.loads(backend.to_str())
    model = described["model"]
    if (
        model.get("type") != "BPE"
        or model.get("dropout")
        or model.get("continuing_subword_prefix")
        or model.get("end_of_word_suffix")
    ):
        raise _unknown(f"a {model.get('type')} model of this kind")
    notices: list[str] = []
    kind = _sentencepiece(described, notices) if model.get("byte_fallback") else _byte_level(described)
    tokens, types = _tokens(described, rows, kind, notices)
    fields = {
        **kind,
        "tokenizer.ggml.tokens": Field("string", tokens),
        "tokenizer.ggml.token_type": Field("int32", types),
    }
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    if kind["tokenizer.ggml.model"].value == "gpt2":
        fields["tokenizer.ggml.merges"] = Field("string", [" ".join(pair) for pair in merges])
    else:
        fields["tokenizer.ggml.scores"] = Field("float32", _scores(tokens, merges))
    return fields | _special(tokenizer, rows), notices


def _unknown(what: str) -> CheckpointError:
    return CheckpointError(f"llama.cpp has no name for this tokenizer: {what}", "tokenizer.json", _WAY_OUT)


def _steps(part: dict[str, Any] | None, plural: str) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer as the list of its steps."""
    if part is None:
        return []
    return [step for inner in part[plural] for step in _steps(inner, plural)] if part["type"] == "Sequence" else [part]


def _byte_level(described: dict[str, Any]) -> dict[str, Field]:
    """The kind and pre-tokenizer of a byte-level BPE (GPT-2, Llama 3, Qwen)."""
    steps, normal = _steps(described["pre_tokenizer"], "pretokenizers"), _steps(described["normalizer"], "normalizers")
    last = steps[-1] if steps else {}
    before = tuple(_rule(step) for step in steps[:-1])
    splits, skips = bool(last.get("use_regex", True)), bool(described["model"].get("ignore_merges"))
    name = _PRE.get((before, splits, skips))
    # Qwen normalises texts to Unicode's composed form (NFC), which llama.cpp leaves to its caller.
    plain = not normal or (name == "qwen2" and [step["type"] for step in normal] == ["NFC"])
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space") or name is None or not plain:
        shown = [step["type"] for step in (*normal, *steps)]
        raise _unknown(f"a byte-level BPE behind {', '.join(shown) or 'nothing'}, with rules that it does not have")
    return {"tokenizer.ggml.model": Field("string", "gpt2"), "tokenizer.ggml.pre": Field("string", name)}


def _rule(step: dict[str, Any]) -> str:
    """The rule of a step before the byte level: "digits", or the expression that it splits by; "" for any other."""
    if step["type"] == "Digits" and step.get("individual_digits"):
        return "digits"
    if step["type"] == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return step["pattern"].get("Regex", "")
    return ""


def _sentencepiece(described: dict[str, Any], notices: list[str]) -> dict[str, Field]:
    """The kind of a BPE with byte fallback (Llama 2, Mistral, Gemma), and whether a space is put in front of a text."""
    normal, steps = _steps(described["normalizer"], "normalizers"), _steps(described["pre_tokenizer"], "pretokenizers")
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = {"type": "Prepend", "prepend": SPACE}
    # Spaces were replaced, so a split at spaces does nothing.
    split = len(steps) == 1 and steps[0]["type"] == "Split" and steps[0]["pattern"] == {"String": " "}
    first = False
    if normal == [prepend, spaces] and not steps:
        first = True
    elif len(steps) == 1 and not normal and steps[0]["type"] == "Metaspace" and steps[0]["replacement"] == SPACE:
        first = steps[0].get("prepend_scheme", "always") != "never"
        if steps[0].get("prepend_scheme") == "first":
            notices.append(
                "llama.cpp puts a space also in front of text behind a special token; "
                "this tokenizer only at the very start"
            )
    elif normal != [spaces] or not (split or not steps):
        raise _unknown(
            f"a BPE with byte fallback behind {', '.join(step['type'] for step in (*normal, *steps)) or 'nothing'}"
        )
    return {"tokenizer.ggml.model": Field("string", "llama"), "tokenizer.ggml.pre": Field("string", "default"),
            "tokenizer.ggml.add_space_prefix": Field("bool", first)}  # fmt: skip


def _tokens(
    described: dict[str, Any], rows: int, kind: dict[str, Field], notices: list[str]
) -> tuple[list[str], list[int]]:
    """The text and type of each id below ``rows``; an id without a token is called [PAD<id>] and marked as unused."""
    sentencepiece = kind["tokenizer.ggml.model"].value == "llama"
    tokens, types = [f"[PAD{i}]" for i in range(rows)], [UNUSED] * rows
    unknown = described["model"].get("unk_token")
    beyond = 0
    for text, number in described["model"]["vocab"].items():
        if number >= rows:
            beyond += 1
            continue
        tokens[number], types[number] = text, NORMAL
        if sentencepiece and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            types[number] = BYTE
        elif sentencepiece and text == unknown:
            types[number] = UNKNOWN
    for added in described["added_tokens"]:
        number, text = added["id"], added["content"]
        if number >= rows:
            beyond += 1
        elif types[number] != UNKNOWN:
            types[number] = CONTROL if added["special"] else USER_DEFINED
            # llama.cpp looks for user-defined tokens in the text before its spaces are replaced.
            tokens[number] = text if added["special"] else text.replace(SPACE, " ")
    if beyond:
        notices.append(f"{beyond} tokens of the tokenizer lie behind the model's {rows} embeddings: left out")
    twice = len(tokens) - len(set(tokens))
    if twice:
        raise CheckpointError(
            f"{twice} tokens of the vocabulary have the text of another, which llama.cpp refuses",
            "tokenizer.json",
            _WAY_OUT,
        )
    return tokens, types


def _scores(tokens: list[str], merges: list[tuple[str, ...]]) -> list[float]:
    """The score of each token: minus the rank of the first merge that makes it, since SentencePiece joins the pair with
    the highest score first."""
    rank: dict[str, int] = {}
    for number, pair in enumerate(merges):
        rank.setdefault("".join(pair), number)
    return [-float(rank.get(token, len(merges))) for token in tokens]


def _special(tokenizer: PreTrainedTokenizerBase, rows: int) -> dict[str, Field]:
    """The fields of the special tokens, of those put around a text, and of the chat template."""
    fields: dict[str, Field] = {}
    for key, attribute in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        number = getattr(tokenizer, f"{attribute}_token_id", None)
        if isinstance(number, int) and number < rows:
            fields[f"tokenizer.ggml.{key}_token_id"] = Field("uint32", number)
    around: Any = tokenizer("a")["input_ids"]
    fields["tokenizer.ggml.add_bos_token"] = Field("bool", bool(around) and around[0] == tokenizer.bos_token_id)
    fields["tokenizer.ggml.add_eos_token"] = Field("bool", len(around) > 1 and around[-1] == tokenizer.eos_token_id)
    template: Any = getattr(tokenizer, "chat_template", None)
    template = template.get("default") if isinstance(template, dict) else template
    if isinstance(template, str) and template:
        fields["tokenizer.chat_template"] = Field("string", template)
    return fields

"""A released llama.cpp opens our GGUF files: its tokens are transformers', its C code's weights ours bit for bit, its
logits near.

Needs a Python with tests/interop/engines/llama.txt installed: LLAMA_PYTHON names it. `make interop` builds one and runs
this file."""

import json
import os
import pydoc_data.topics
import random
import shutil
import string
import subprocess
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from types import ModuleType

import pytest
import tiny_models
import torch
import transformers as hf
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

import leangrid
from leangrid.block_types import BLOCK_TYPES
from leangrid.models.gguf_vocab import LLAMA3, QWEN2, TEKKEN
from leangrid.models.result_reader import ResultReader
from leangrid.storage.manifest import amend_result

PYTHON = os.environ.get("LLAMA_PYTHON", "")
RUNNER = Path(__file__).parent / "engines" / "run_llama.py"
pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(not PYTHON, reason="LLAMA_PYTHON names no interpreter with llama.cpp"),
]
SPACE = "\u2581"


def asked(model: Path, tokens: list[int], new: int, directory: Path, **more: object) -> dict:
    """The runner's answer."""
    request = {
        "model": str(model),
        "tokens": tokens,
        "new": new,
        "threads": 1,
        "logits": str(directory / "logits.safetensors"),
        "result": str(directory / "result.json"),
        **more,
    }
    done = subprocess.run([PYTHON, str(RUNNER)], input=json.dumps(request), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((directory / "result.json").read_text())


def finished(model: str, scheme: str, out: Path) -> Path:
    """A tiny bfloat16 model, quantized; ``out``.parent / "source" is the original."""
    with pytest.MonkeyPatch.context() as patch:
        if model == "gemma3":  # llama.cpp's has one full attention in six blocks, so two blocks have none
            more = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16}
            patch.setitem(tiny_models.CONFIGS, "gemma3", lambda: hf.Gemma3TextConfig(**tiny_models._GQA, **more))
        patch.setitem(
            tiny_models.CONFIGS,
            "wide",
            lambda: tiny_models._llama(hidden_size=256, intermediate_size=512, initializer_range=0.04),
        )
        tiny_models.save(model, out.parent / "source", torch.bfloat16)
    recipe = leangrid.Recipe(scheme=scheme, steps=64, correct=0, refine=0)
    leangrid.quantize(out.parent / "source", out, recipe, windows=tiny_models.tokens(2, 16))
    return out


MODELS = ["llama2", "llama3", "llama3_tied", "mistral", "qwen2", "qwen3", "gemma3"]
WIDE = [*BLOCK_TYPES, "W5A16", "W6A16_SYM"]  # blocks of 256 columns; in the narrower models theirs of 32


@pytest.mark.parametrize(
    ("model", "scheme"),
    [*product(MODELS, ["W4A16_G32", "W4A16_G32_SYM", "W8A16_SYM", "Q4_K"]), *product(["wide"], WIDE)],
)
def test_weights_and_logits(model: str, scheme: str, tmp_path: Path, bench: Callable[[str], ModuleType]) -> None:
    source = finished(model, scheme, tmp_path / "out")
    leangrid.export(source, tmp_path / "gguf", to="gguf")
    tokens = tiny_models.tokens(1, 14)[0].tolist()
    asked(tmp_path / "gguf", tokens, 4, tmp_path, weights=str(tmp_path / "weights.safetensors"))
    result, weights = ResultReader.verified(source), load_file(tmp_path / "weights.safetensors")
    for name, weight in bench("common.interop_models").llama_weights(result):
        assert torch.equal(weights[name], weight.flatten()), name
    ours = hf.AutoModelForCausalLM.from_pretrained(source.parent / "source", dtype=torch.float32)
    for name in result.layers:
        codes, grid = result.layer(name)
        ours.get_submodule(name).weight.data = grid.dequantize(codes)
    with torch.no_grad():
        expected = ours.eval()(torch.tensor([tokens])).logits[0]
    got = load_file(tmp_path / "logits.safetensors")["logits"]
    # llama.cpp rounds activations to 8 bits for each product: near, not equal. A permuted head or a lost norm is far
    # off.
    assert float((got - expected).norm() / expected.norm()) < 0.03


def byte_level(steps: list, use_regex: bool, ignore_merges: bool = False) -> hf.PreTrainedTokenizerFast:
    described = json.loads(tiny_models.tokenizer().backend_tokenizer.to_str())
    described["model"]["ignore_merges"] = ignore_merges
    made = Tokenizer.from_str(json.dumps(described))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)]
    )
    return hf.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<bos>", eos_token="<eos>")


def split(pattern: str) -> pre_tokenizers.Split:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def sentencepiece(prefix: bool) -> hf.PreTrainedTokenizerFast:
    """A BPE with bytes for what it does not know, trained on Python's help topics; as Llama 2's, or without a space in
    front as Gemma's."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    trained.pre_tokenizer = pre_tokenizers.Split(SPACE, "merged_with_next")
    trained.train_from_iterator(
        sorted(pydoc_data.topics.topics.values())[:40], trainers.BpeTrainer(vocab_size=250, show_progress=False)
    )
    described = json.loads(trained.to_str())["model"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *described["vocab"]]
    merges = [tuple(pair) for pair in described["merges"]]
    bpe = models.BPE({t: i for i, t in enumerate(tokens)}, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    made = Tokenizer(bpe)
    spaces = normalizers.Replace(" ", SPACE)
    made.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefix else spaces
    made.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return hf.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TOKENIZERS: dict[str, Callable[[], hf.PreTrainedTokenizerFast]] = {
    "gpt-2": lambda: byte_level([], True),
    "smollm": lambda: byte_level([pre_tokenizers.Digits(individual_digits=True)], True),
    "llama-bpe": lambda: byte_level([split(LLAMA3)], False, ignore_merges=True),
    "smaug-bpe": lambda: byte_level([split(LLAMA3)], False),
    "qwen2": lambda: byte_level([split(QWEN2)], False),
    "tekken": lambda: byte_level([split(TEKKEN)], False, ignore_merges=True),
    "spm-prefix": lambda: sentencepiece(prefix=True),
    "spm": lambda: sentencepiece(prefix=False),
}
WRITTEN = [
    " ",
    "  ",
    "\n",
    "\n\n",
    "\t\tx",
    "a",
    " a",
    "a ",
    "Hello, world!",
    "3.14159",
    "1234567890",
    "2024-01-31 23:59:59",
    "x=1;y=22;z=333",
    "café naïve résumé",
    "日本語のテキストです。",
    "中文字符测试",
    "한국어 문장",
    "Привет, мир",
    "مرحبا بالعالم",
    "हिन्दी पाठ",
    "ไทยภาษา",
    "😀🎉 emoji",
    "e\u0301 combining",
    "\u200bzero width",
    "tab\tand\r\nnewline",
    "don't I'll we've THEY'RE I'M it's",
    "snake_case CamelCase kebab-case",
    "http://example.com/a?b=c&d=e#f",
    "C:\\Windows\\System32",
    "a" * 200,
    " " * 50,
    "\n" * 20,
    "!@#$%^&*()",
    "...---...",
    "½ ² ³ ① Ⅷ",
    "١٢٣٤",
    "x²+y²=z²",
    '<html><body class="x">',
    "def f(x):\n    return x**2\n",
    "for (int i = 0; i < n; ++i) { a[i] += b[i]; }",
    '{"k": [1, 2.5, null, true]}',
]


@cache
def texts() -> list[str]:
    """220 strings: written ones, pieces of English with code, and random mixtures of many alphabets."""
    draw = random.Random(0)
    english = " ".join(sorted(pydoc_data.topics.topics.values()))
    letters = string.printable + "äöüßéèñçøåœŁżšđ€£©—“”…αβγδжщя漢字かなカナ한글\U0001f600\u00a0\u2003"
    found = list(WRITTEN)
    for _ in range(90):
        start = draw.randrange(len(english) - 400)
        found.append(english[start : start + draw.randrange(1, 300)])
    while len(found) < 220:
        found.append("".join(draw.choice(letters) for _ in range(draw.randrange(1, 80))))
    return found


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished("llama2", "W4A16_G32_SYM", tmp_path_factory.mktemp("llama") / "out")


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokens_are_transformers(small: Path, name: str, tmp_path: Path) -> None:
    source, tokenizer = tmp_path / "model", TOKENIZERS[name]()
    shutil.copytree(small, source)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    for path in (tmp_path / "tokenizer").iterdir():
        amend_result(source, {path.name: path.read_bytes()})
    leangrid.export(source, tmp_path / "gguf", to="gguf")
    answer = asked(tmp_path / "gguf", [5, 6], 1, tmp_path, texts=texts())
    wrong = [text for text, ids in zip(texts(), answer["ids"], strict=True) if ids != tokenizer(text)["input_ids"]]
    assert wrong == []

"""How each container is opened and served, as lines to type. Which of them were tested, and how: docs/serving.md."""

from leangrid.report.facts import Facts

_PLAIN = 'from transformers import MODEL\nmodel = MODEL.from_pretrained("DIR")'
_LOAD = 'import leangrid\nmodel, tokenizer = leangrid.load("DIR")'
_GPTQ = 'from gptqmodel import GPTQModel\nmodel = GPTQModel.load("DIR")'
_MLX = """from mlx_lm import generate, load  # pip install mlx-lm
model, tokenizer = load("DIR")
print(generate(model, tokenizer, prompt="Once upon a time"))"""
_VLLM = "vllm serve DIR"
BLOCKS = "gguf blocks"  # llama.cpp's blocks in a directory of ours, not yet one .gguf file

# Container -> (language, lines): what a model card shows, with the model's class for MODEL.
OPEN: dict[str, tuple[str, str]] = {
    "compressed-tensors": ("python", _PLAIN),
    "gptq": ("python", _GPTQ),
    "gptq_v1": ("python", _GPTQ),
    "awq": ("python", _PLAIN.replace("\n", "\n# transformers reads awq with the help of: pip install gptqmodel\n", 1)),
    "mlx": ("python", _MLX),
    "dense": ("python", _PLAIN),
    "onnx": ("python", 'import onnxruntime_genai as og\nmodel = og.Model("DIR")'),
    "gguf": ("bash", "llama-server -m DIR/model.gguf"),
    "lut": ("python", _PLAIN.replace("\n", "\nimport leangrid  # registers the format\n", 1)),
    BLOCKS: ("bash", "leangrid export DIR FILE --to gguf\nllama-server -m FILE/model.gguf"),
}

# Container -> (engine, lines) of servers.
SERVE: dict[str, tuple[str, str]] = {
    "compressed-tensors": ("vLLM", _VLLM),
    "awq": ("vLLM", _VLLM),
    "dense": ("vLLM", _VLLM),
    "lut": (
        "vLLM",
        "pip install --no-deps leangrid jaxtyping wadler-lindig  # beside vLLM; it registers itself\n" + _VLLM,
    ),
    "mlx": ("mlx-lm", "mlx_lm.server --model DIR"),
}

# What leangrid.load does not open: whole files of another engine.
NOT_LOADED = frozenset({"gguf", "onnx"})


def serving_key(container: str, exported: bool) -> str:
    """The key of the tables above: quantize's ``gguf`` is blocks in a directory, export's is one file."""
    return BLOCKS if container == "gguf" and not exported else container


def snippet(facts: Facts) -> tuple[str, str]:
    """(language, lines) that open a result; those of leangrid where transformers alone does not."""
    key = serving_key(facts.container, facts.exported_from is not None)
    language, lines = OPEN.get(key, ("python", _LOAD)) if facts.plain else ("python", _LOAD)
    return language, lines.replace("MODEL", facts.model_class)


def server(facts: Facts) -> tuple[str, str] | None:
    """(engine, lines) of a server for a result, with a word where nobody has seen it read such a one; None: none is
    known."""
    found = SERVE.get(serving_key(facts.container, facts.exported_from is not None))
    if found is None or facts.plain:
        return found
    engine, lines = found
    return f"{engine}, not tried with results that transformers does not open by itself", lines

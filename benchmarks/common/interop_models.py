"""What interop.py gives to the engines: results of ``leangrid quantize``, each made once and kept, and our own model's
answers to a prompt.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import transformers
from torch import Tensor

import leangrid
from common.workload import default_source
from leangrid.data.sampling import sample_windows
from leangrid.exporters.export import WHOLE
from leangrid.inference.layers import AffineLinear
from leangrid.models.gguf import dequantize
from leangrid.models.gguf_names import describe
from leangrid.models.result_reader import ResultReader
from leangrid.storage import safetensors

PROMPT = "The capital of France is Paris, and the capital of Italy is"
SAMPLES, LENGTH, SEED = 16, 256, 0
TINY = "tiny-llama"
SEARCHED = frozenset({"mlx"})  # containers whose asymmetric grids no other result holds


@dataclass(frozen=True)
class Ours:
    """What ``leangrid.load``'s model answers: ``logits`` float32 [prompt, vocab], the ``tokens`` that follow greedily,
    ``steps`` float32 [tokens, vocab], the logits each was chosen from, and ``ends``, the ids that end a text."""

    logits: Tensor
    tokens: list[int]
    steps: Tensor
    ends: tuple[int, ...]

    @classmethod
    @torch.no_grad()
    def of(cls, directory: Path, prompt: list[int], new: int, dtype: torch.dtype, rounds: bool) -> Self:
        """Open ``directory`` in ``dtype`` and decode ``new`` tokens greedily, past any token that ends a text.

        ``rounds`` False: affine weights are S (q - Z) in float32, not rounded to the model's own dtype.
        """
        model = leangrid.load(directory, dtype=dtype, dense=rounds)[0]
        for module in model.modules():
            if not rounds and isinstance(module, AffineLinear):
                module.stored_dtype = torch.float32
        out = model(input_ids=torch.tensor([prompt]), use_cache=True)
        logits, rows = out.logits[0].float(), [out.logits[0, -1].float()]
        tokens = [int(rows[-1].argmax())]
        while len(tokens) < new:
            out = model(input_ids=torch.tensor([tokens[-1:]]), past_key_values=out.past_key_values, use_cache=True)
            rows.append(out.logits[0, -1].float())
            tokens.append(int(rows[-1].argmax()))
        end = model.generation_config.eos_token_id if model.generation_config else None
        return cls(
            logits, tokens, torch.stack(rows), tuple(end if isinstance(end, list) else [] if end is None else [end])
        )

    def until_end(self, tokens: list[int]) -> list[int]:
        """``tokens`` before the first one that ends a text: engines stop there."""
        stop = next((i for i, token in enumerate(tokens) if token in self.ends), len(tokens))
        return tokens[:stop]


@dataclass(frozen=True)
class Models:
    """Results in ``kept``/MODEL/SCHEME[-CONTAINER], made where they do not exist yet. Exports are written to
    ``folder``, which is temporary."""

    kept: Path
    folder: Path

    def about(self, scheme: str, container: str, model: str) -> dict[str, Any]:
        """The fields of a case's line that are known before it runs."""
        parsed = leangrid.Scheme.parse(scheme)
        return {"model": model, "scheme": scheme, "format": container, "bits": parsed.bits, "group": parsed.group_size,
                "symmetric": parsed.symmetric}  # fmt: skip

    def source(self, model: str) -> Path:
        """The checkpoint that is quantized."""
        source = self.kept / model / "source"
        if not (source / "config.json").is_file():
            (self.kept / model).mkdir(parents=True, exist_ok=True)
            if model in TINY_MODELS:
                _tiny(model, source)
            else:
                dequantize(default_source(), source)
        return source

    def result(self, scheme: str, container: str, model: str) -> Path:
        """The finished result in the default container of its scheme, or in ``container`` where that has grids of its
        own (SEARCHED)."""
        own = container in SEARCHED and not leangrid.Scheme.parse(scheme).symmetric
        out = self.kept / model / (f"{scheme}-{container}" if own else scheme)
        if not (out / "manifest.json").is_file():
            fields = {"scheme": scheme, "format": container if own else "auto"}
            recipe = leangrid.Recipe(**fields, calibration="self", samples=SAMPLES, length=LENGTH, seed=SEED)
            leangrid.quantize(self.source(model), out, recipe, windows=self._windows(model))
        return out

    def exported(self, scheme: str, container: str, model: str) -> Path:
        """The directory or file that the engine opens."""
        result = self.result(scheme, container, model)
        own = json.loads((result / "manifest.json").read_bytes())["recipe"]["format"]
        if (
            own == container and container not in WHOLE
        ):  # gguf blocks lie in a directory of ours until they are exported
            return result
        out = self.folder / f"{model}-{scheme}-{container}"
        if not out.exists():
            leangrid.export(result, out, to=container)
        return out

    def prompt(self, model: str) -> list[int]:
        """The token ids of PROMPT."""
        return transformers.AutoTokenizer.from_pretrained(self.source(model))(PROMPT).input_ids

    def _windows(self, model: str) -> Tensor:
        """Calibration windows int64 [SAMPLES, LENGTH], sampled once from the model itself."""
        file = self.kept / model / "windows.safetensors"
        if not file.is_file():
            opened, tokenizer = leangrid.load(self.source(model), dtype=torch.float32)
            safetensors.save(file, {"windows": sample_windows(opened, tokenizer, SAMPLES, LENGTH, SEED)}, {})
        return safetensors.load(file)["windows"]


def llama_weights(result: ResultReader) -> Iterator[tuple[str, Tensor]]:
    """The name in a GGUF file and the weight, float32 [rows, cols] with rows in llama.cpp's order, of every quantized
    linear."""
    model = describe(result.checkpoint.config, "")
    for name, (rows, _) in result.layers.items():
        codes, grid = result.layer(name)
        weight, order = grid.dequantize(codes), model.row_order(f"{name}.weight", rows)
        yield model.tensor_name(f"{name}.weight"), weight if order is None else weight[order]


def _tiny(model: str, directory: Path) -> None:
    """Write ``model`` with random bfloat16 weights and the real model's tokenizer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        Models(directory.parents[1], directory).source("SmolLM2-135M-Instruct")
    )
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "head_dim": 64,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(SEED)
    made = TINY_MODELS[model](sizes).bfloat16()
    tied = made.config.tie_word_embeddings
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.ndim == 2:  # logits of spread 4, so that the largest stands out
                inside = (4.0 if "lm_head" in name or (tied and "embed" in name) else 1.0) * parameter.shape[1] ** -0.5
                parameter.normal_(std=1.0 if "embed" in name and not tied else inside)
    made.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _llama(sizes: dict[str, Any]) -> transformers.PreTrainedModel:
    """Two blocks with shapes that the real model does not have: columns that divide by 256 (and 128), an untied
    head."""
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, num_hidden_layers=2, tie_word_embeddings=False)
    )


def _gemma3(sizes: dict[str, Any]) -> transformers.PreTrainedModel:
    """Six blocks: five attend to the last 16 tokens, fewer than are generated; one attends to all."""
    config = transformers.Gemma3TextConfig(**sizes, num_hidden_layers=6, sliding_window=16, query_pre_attn_scalar=64)
    return transformers.Gemma3ForCausalLM(config)


TINY_MODELS = {TINY: _llama, "tiny-gemma3": _gemma3}

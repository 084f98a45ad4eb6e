"""Checkpoints of random weights in the shapes of known models, for measurements of time and memory."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers

from leangrid.storage import files, safetensors

_LLAMA = {
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
MODELS: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 8, "layers": 4, "vocab_size": 512},
    "narrow": {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_attention_heads": 32,
        "layers": 249,
        "vocab_size": 512,
    },
    "smollm2-135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "layers": 30,
    },
    "llama-3-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "layers": 32},
    "llama-3-70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "layers": 80},
    "llama-3.1-405b": {"hidden_size": 16384, "intermediate_size": 53248, "num_attention_heads": 128, "layers": 126},
}
VOCABULARY = 32000  # rows of embeddings, not the models' 128,256: more than any hidden size, and less to write
_OUTLIERS, _OUTLIER = 0.005, 20.0  # share of channels, and how much larger they are


def checkpoint(directory: Path, model: str, blocks: int, device: str, seed: int = 0) -> Path:
    """Write a checkpoint with ``blocks`` random blocks of ``model`` and a small embedding in bfloat16, one shard for
    each block, and return ``directory``. Only one block is in memory at a time."""
    shapes = {"vocab_size": VOCABULARY, **_LLAMA, **MODELS[model], "num_hidden_layers": blocks}
    shapes.pop("layers")
    config = transformers.LlamaConfig(dtype="bfloat16", **shapes)
    config.architectures = ["LlamaForCausalLM"]
    vocabulary, hidden, inner = config.vocab_size, config.hidden_size, config.intermediate_size
    kv = hidden // config.num_attention_heads * config.num_key_value_heads
    generator = torch.Generator(device).manual_seed(seed)

    def matrix(rows: int, cols: int) -> torch.Tensor:
        return torch.randn(rows, cols, generator=generator, device=device, dtype=torch.bfloat16).mul_(cols**-0.5).cpu()

    def channels() -> torch.Tensor:
        large = torch.rand(hidden, generator=generator, device=device) < _OUTLIERS
        return torch.where(large, _OUTLIER, 1.0).to(torch.bfloat16).cpu()

    files.make_dir(directory)
    index: dict[str, str] = {}
    for number in range(blocks + 1):
        prefix = f"model.layers.{number}."
        if number == blocks:
            shard = {
                "model.embed_tokens.weight": matrix(vocabulary, hidden) * channels(),
                "model.norm.weight": channels(),
            }
        else:
            linears = {
                "self_attn.q_proj": (hidden, hidden),
                "self_attn.k_proj": (kv, hidden),
                "self_attn.v_proj": (kv, hidden),
                "self_attn.o_proj": (hidden, hidden),
                "mlp.gate_proj": (inner, hidden),
                "mlp.up_proj": (inner, hidden),
                "mlp.down_proj": (hidden, inner),
            }
            shard = {f"{prefix}{name}.weight": matrix(*shape) for name, shape in linears.items()}
            shard |= {f"{prefix}{norm}.weight": channels() for norm in ("input_layernorm", "post_attention_layernorm")}
        name = f"model-{number + 1:05d}-of-{blocks + 1:05d}.safetensors"
        safetensors.save(directory / name, shard, {"format": "pt"})
        index |= dict.fromkeys(shard, name)
    config.save_pretrained(directory)
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index}), encoding="utf-8"
    )
    return directory

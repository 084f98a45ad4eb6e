"""Checkpoints of large models without weights: a config, and files whose headers are whole and whose data are holes.

A file is as long as it says, and takes no room on the disk."""

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

_SHARD = 5 << 30  # bytes, as the hub's own
_DEEPSEEK = {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]}
# What published models state beside their types' own defaults.
CONFIGS: dict[str, dict[str, Any]] = {
    "tiny-moe": {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 64,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "vocab_size": 64,
    },
    "llama-3.1-405b": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 16384,
        "intermediate_size": 53248,
        "num_hidden_layers": 126,
        "num_attention_heads": 128,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
    },
    "deepseek-v3": _DEEPSEEK,
    "kimi-k2": _DEEPSEEK
    | {
        "n_routed_experts": 384,
        "num_attention_heads": 64,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "vocab_size": 163840,
    },
    "qwen3-235b-a22b": {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": 94,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "vocab_size": 151936,
    },
    "llama-4-maverick": {
        "model_type": "llama4",
        "architectures": ["Llama4ForConditionalGeneration"],
        "text_config": {"num_local_experts": 128, "interleave_moe_layer_step": 2, "attn_temperature_tuning": True},
    },
    "qwen3.5-397b-a17b": {
        "model_type": "qwen3_5_moe",
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "text_config": {
            "hidden_size": 4096,
            "num_hidden_layers": 60,
            "num_attention_heads": 32,
            "num_key_value_heads": 2,
            "linear_num_value_heads": 64,
            "num_experts": 512,
            "num_experts_per_tok": 10,
            "moe_intermediate_size": 1024,
            "shared_expert_intermediate_size": 1024,
        },
    },
}


def write(directory: Path, fields: Mapping[str, Any]) -> Path:
    """Write the checkpoint that transformers would save of the model of these config fields, in bfloat16 and without
    numbers, and return ``directory``."""
    config = transformers.CONFIG_MAPPING[fields["model_type"]].from_dict(dict(fields))
    with torch.device("meta"):
        model = getattr(transformers, fields["architectures"][0])(config)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    stored = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    shards = list(_shards(revert_weight_conversion(model, stored)))
    directory.mkdir(parents=True)
    index: dict[str, str] = {}
    for number, shard in enumerate(shards):
        name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(directory / name, shard)
        index |= dict.fromkeys(shard, name)
    config.dtype = torch.bfloat16
    config.architectures = fields["architectures"]
    config.save_pretrained(directory)
    text = json.dumps({"metadata": {}, "weight_map": index})
    (directory / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return directory


def _shards(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if shard and size + 2 * tensor.numel() > _SHARD:
            yield shard
            shard, size = {}, 0
        shard[name], size = tensor, size + 2 * tensor.numel()
    yield shard


def _write_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [end, end + 2 * tensor.numel()]}
        end += 2 * tensor.numel()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)

"""GGUF files of the tiny models, written by gguf-py as llama.cpp's converter writes them: an oracle that shares no code
with the reader."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tiny_models
import torch
import transformers as hf

ARCHES = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
    "gpt2": "gpt2",
    "olmoe": "olmoe",
}


def tensors_of(model: hf.PreTrainedModel) -> dict[str, np.ndarray]:
    """The model's tensors under llama.cpp's names, in its order of rows and shapes."""
    config: Any = model.config
    arch = ARCHES[config.model_type]
    number = next(number for number, text in gguf.MODEL_ARCH_NAMES.items() if text == arch)
    table = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    made: dict[str, np.ndarray] = {}
    for name, tensor in model.state_dict().items():
        if name in tied:
            continue
        values = tensor.float().numpy()
        if name.endswith("experts.gate_up_proj"):
            gate, up = np.split(values, 2, axis=1)
            block = name.split(".")[2]
            made |= {f"blk.{block}.ffn_gate_exps.weight": gate, f"blk.{block}.ffn_up_exps.weight": up}
            continue
        if name.endswith("experts.down_proj"):
            made[f"blk.{name.split('.')[2]}.ffn_down_exps.weight"] = values
            continue
        for text, heads in ((".q_proj.", "num_attention_heads"), (".k_proj.", "num_key_value_heads")):
            if arch == "llama" and text in name:
                count = getattr(config, heads)
                values = (
                    values.reshape(count, 2, values.shape[0] // count // 2, -1).swapaxes(1, 2).reshape(values.shape)
                )
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            values = values + 1
        if re.search(r"\.(c_attn|c_proj|c_fc)\.weight$", name):
            values = values.T
        theirs = table.get_name(name, try_suffixes=(".weight", ".bias"))
        assert theirs is not None, name
        made[theirs] = values[0] if theirs.endswith("gate_inp_shexp.weight") else values
    return made


def fields_of(config: Any) -> dict[str, Any]:
    """The header fields without rotary scaling, with the types that llama.cpp's converter gives them."""
    heads = config.num_attention_heads
    found: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "attention.head_count": heads,
    }
    if config.model_type == "gpt2":
        return found | {
            "feed_forward_length": 4 * config.hidden_size,
            "attention.layer_norm_epsilon": config.layer_norm_epsilon,
        }
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = config.rope_parameters
    found |= {
        "feed_forward_length": config.intermediate_size,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": rope.get("full_attention", rope).get("rope_theta"),
    }
    if size * heads != config.hidden_size or config.model_type.startswith("gemma"):
        found |= {"attention.key_length": size, "attention.value_length": size}
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    if experts:
        found |= {"expert_count": experts, "expert_used_count": config.num_experts_per_tok}
        for key, name in (("expert_feed_forward_length", "moe_intermediate_size"),
                          ("expert_shared_feed_forward_length", "shared_expert_intermediate_size")):  # fmt: skip
            if getattr(config, name, None):
                found[key] = getattr(config, name)
    if config.model_type.startswith("gemma"):
        found["attention.sliding_window"] = config.sliding_window
    if config.model_type == "gemma2":
        found |= {
            "attn_logit_softcapping": config.attn_logit_softcapping,
            "final_logit_softcapping": config.final_logit_softcapping,
        }
    if config.model_type == "phi3":
        found["rope.dimension_count"] = int(size * rope.get("partial_rotary_factor", 1.0))
    return found


def vocabulary(rows: int) -> dict[str, Any]:
    """The tiny tokenizer as llama.cpp's fields."""
    tokenizer = tiny_models.tokenizer()
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens, types = [f"[PAD{i}]" for i in range(rows)], [5] * rows
    for text, number in described["model"]["vocab"].items():
        tokens[number], types[number] = text, 1
    for added in described["added_tokens"]:
        types[added["id"]] = 3
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in described["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
    }


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    else:
        writer.add_array(key, value)


def write(
    path: Path,
    model: hf.PreTrainedModel,
    *,
    kind: str = "F32",
    fields: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray | None] | None = None,
    shards: int = 1,
    vectors: str = "F32",
) -> list[Path]:
    """Write ``model`` as ``path``, or as ``shards`` files of llama-gguf-split's names.

    ``kind``: ggml's type of the matrices. ``fields``: replace or add fields; without a prefix they get the
    architecture's; None takes one away. ``tensors``: the same for tensors."""
    config: Any = model.config
    arch = ARCHES[config.model_type]
    said = {f"{arch}.{key}": value for key, value in fields_of(config).items()} | vocabulary(config.vocab_size)
    for key, value in (fields or {}).items():
        said[key if key.startswith(("general.", "tokenizer.", "split.", "other.")) else f"{arch}.{key}"] = value
    held = {name: value for name, value in (tensors_of(model) | dict(tensors or {})).items() if value is not None}
    names = list(held)
    per = -(-len(names) // shards)
    written = []
    for number in range(shards):
        file = path if shards == 1 else path.with_name(f"{path.stem}-{number + 1:05d}-of-{shards:05d}.gguf")
        writer = gguf.GGUFWriter(file, arch)
        if number == 0:
            for key, value in said.items():
                if value is not None:
                    _add(writer, key, value)
        if shards > 1:
            writer.add_uint16("split.no", number)
            writer.add_uint16("split.count", shards)
            writer.add_int32("split.tensors.count", len(names))
        _put(writer, {name: held[name] for name in names[number * per : (number + 1) * per]}, kind, vectors)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        written.append(file)
    return written


def _put(writer: gguf.GGUFWriter, tensors: Mapping[str, np.ndarray], kind: str, vectors: str) -> None:
    for name, values in tensors.items():
        chosen = gguf.GGMLQuantizationType[vectors if values.ndim == 1 else kind]
        values = np.ascontiguousarray(values, dtype=np.float32)
        if chosen.name in ("F32", "F16"):
            writer.add_tensor(name, values.astype(np.float32 if chosen.name == "F32" else np.float16))
        elif chosen.name == "F64":
            writer.add_tensor(name, values.astype(np.float64))
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, chosen), raw_dtype=chosen)


def build(config: hf.PreTrainedConfig, seed: int = 0) -> hf.PreTrainedModel:
    """A model of ``config`` with every parameter random."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        model.requires_grad_(False)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def logits(model: Any, tokens: Sequence[int] | None = None) -> torch.Tensor:
    """What the model says of 40 tokens: more than the windows and original lengths of the tiny models."""
    ids = torch.tensor([tokens]) if tokens is not None else tiny_models.tokens(1, 80)
    with torch.no_grad():
        return model(ids).logits

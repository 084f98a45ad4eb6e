"""The architectures of llama.cpp that leangrid reads: config.json from the header of each.

Source: llama.cpp's loaders (src/models/*.cpp). A missing field takes llama.cpp's default, not transformers'. To add an
architecture, add its function and its row to FAMILIES; the names of its tensors come from gguf-py's name map."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from leangrid.errors import CheckpointError
from leangrid.models.gguf_fields import Fields
from leangrid.models.gguf_rope import rope_parameters

Config = dict[str, Any]
_GEMMA_27B = {"gemma2": 46, "gemma3": 62}  # numbers of blocks of those whose attention is scaled by hidden_size / heads
_ATTENTION_BIASES = ("attn_q.bias", "attn_k.bias", "attn_v.bias", "attn_output.bias")
_MLP_BIASES = ("ffn_gate.bias", "ffn_up.bias", "ffn_down.bias")


@dataclass(frozen=True)
class Family:
    """How llama.cpp stores an architecture.

    Attributes:
        config: makes config.json from the header's fields.
        permuted: rows of q and k are in the original Llama's order: rotated pairs beside each other.
        norm_plus_one: llama.cpp stores a norm's weight, transformers the weight minus one.
        zero_biases: ends of names of biases that are zeros where no block of the file has them.
    """

    config: Callable[[Fields], Config]
    permuted: bool = False
    norm_plus_one: bool = False
    zero_biases: tuple[str, ...] = ()


def _common(fields: Fields) -> Config:
    """The settings that all architectures with RMSNorm and rotary positions have."""
    heads = _positive(fields, "attention.head_count")
    hidden = _positive(fields, "embedding_length")
    head_dim = _head_dim(fields, hidden, heads)
    return {
        "hidden_size": hidden,
        "num_hidden_layers": _positive(fields, "block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.integer("attention.head_count_kv", heads) or heads,
        "head_dim": head_dim,
        "max_position_embeddings": _positive(fields, "context_length"),
        "rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon"),
        "hidden_act": "silu",
    }


def _positive(fields: Fields, key: str) -> int:
    value = fields.integer(key)
    if value == 0:
        raise fields.refusal(key, "0")
    return value


def _head_dim(fields: Fields, hidden: int, heads: int) -> int:
    """The size of a head, which must be the same for keys and values."""
    usual = hidden // heads
    size, values = fields.integer("attention.key_length", usual), fields.integer("attention.value_length", usual)
    if size != values:
        raise fields.refusal("attention.value_length", f"{values} beside attention.key_length = {size}")
    if size == 0 or (
        hidden % heads and "attention.key_length" not in {key.partition(".")[2] for key in fields.header.fields}
    ):
        raise fields.refusal("attention.head_count", f"{heads} heads in {hidden} dimensions")
    return size


def _whole_rope(fields: Fields, head_dim: int) -> Config:
    """The rotary parameters of a class that rotates whole heads."""
    dims = fields.integer("rope.dimension_count", head_dim)
    if dims != head_dim:
        raise fields.refusal("rope.dimension_count", f"{dims} of {head_dim} dimensions of a head")
    return {"rope_parameters": rope_parameters(fields, head_dim)}


def _inner(fields: Fields) -> Config:
    return {"intermediate_size": _positive(fields, "feed_forward_length")}


def _window(fields: Fields) -> int | None:
    """The length of the sliding window; None where it is the whole context."""
    window = fields.integer("attention.sliding_window", 0)
    return window if 0 < window < fields.integer("context_length") else None


def _no_window(fields: Fields) -> None:
    window = _window(fields)
    if window is not None:
        raise fields.refusal("attention.sliding_window", str(window))


def _biases(fields: Fields, ends: tuple[str, ...]) -> bool:
    return any(name.startswith("blk.") and name.endswith(ends) for name in fields.header.tensors)


def _llama(fields: Fields) -> Config:
    common = _common(fields)
    common |= _whole_rope(fields, common["head_dim"]) | _inner(fields)
    window = _window(fields)
    if fields.value("expert_count", 0):
        return (
            common | _experts(fields, "num_local_experts", True) | {"model_type": "mixtral", "sliding_window": window}
        )
    attention, mlp = _biases(fields, _ATTENTION_BIASES), _biases(fields, _MLP_BIASES)
    if window:
        return common | {"model_type": "mistral", "sliding_window": window}
    return common | {"model_type": "llama", "attention_bias": attention, "mlp_bias": mlp}


def _experts(fields: Fields, count: str, normalised: bool) -> Config:
    """The numbers of experts, that of all under the key ``count``.

    ``normalised``: whether llama.cpp makes the weights of a token's experts sum to one for this architecture; a file
    that says otherwise is refused."""
    found = {count: _positive(fields, "expert_count"), "num_experts_per_tok": _positive(fields, "expert_used_count")}
    stored = {tensor.shape[0] for name, tensor in fields.header.tensors.items() if "_exps." in name}
    if stored - {found[count]} or (not stored and found[count] > len(fields.header.tensors)):
        raise fields.refusal("expert_count", f"{found[count]}, and its tensors hold another number of experts")
    norm = fields.value("expert_weights_norm", normalised)
    if bool(norm) != normalised:
        raise fields.refusal("expert_weights_norm", str(norm))
    return found


def _qwen2(fields: Fields) -> Config:
    _no_window(fields)
    common = _common(fields)
    return (
        common
        | _whole_rope(fields, common["head_dim"])
        | _inner(fields)
        | {"model_type": "qwen2", "use_sliding_window": False}
    )


def _qwen3(fields: Fields) -> Config:
    _no_window(fields)
    biases = {"model_type": "qwen3", "use_sliding_window": False, "attention_bias": _biases(fields, _ATTENTION_BIASES)}
    common = _common(fields)
    return common | _whole_rope(fields, common["head_dim"]) | _inner(fields) | biases


def _qwen2_moe(fields: Fields) -> Config:
    _no_window(fields)
    common = _common(fields)
    inner = _inner(fields)["intermediate_size"]
    found = _experts(fields, "num_experts", False)
    sizes = {
        "intermediate_size": inner,
        "moe_intermediate_size": fields.integer("expert_feed_forward_length", 0)
        or inner // found["num_experts_per_tok"],
        "shared_expert_intermediate_size": fields.integer("expert_shared_feed_forward_length", 0) or inner,
    }
    kind = {
        "model_type": "qwen2_moe",
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "use_sliding_window": False,
    }
    return common | _whole_rope(fields, common["head_dim"]) | found | sizes | kind


def _qwen3_moe(fields: Fields) -> Config:
    _no_window(fields)
    common = _common(fields)
    inner = fields.integer("feed_forward_length", 0)
    found = _experts(fields, "num_experts", True)
    each = fields.integer("expert_feed_forward_length", 0) or inner // found["num_experts_per_tok"]
    kind = {"model_type": "qwen3_moe", "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
            "use_sliding_window": False, "attention_bias": _biases(fields, _ATTENTION_BIASES)}  # fmt: skip
    sizes = {"intermediate_size": inner or each, "moe_intermediate_size": each}
    return common | _whole_rope(fields, common["head_dim"]) | found | sizes | kind


def _olmoe(fields: Fields) -> Config:
    _no_window(fields)
    common = _common(fields)
    if common["head_dim"] * common["num_attention_heads"] != common["hidden_size"]:
        raise fields.refusal(
            "attention.key_length", f"{common['head_dim']}, which is not embedding_length / attention.head_count"
        )
    del common["head_dim"]
    clip = fields.number("attention.clamp_kqv", 0.0)
    kind = {"model_type": "olmoe", "norm_topk_prob": False, "clip_qkv": clip or None}
    rope = _whole_rope(fields, common["hidden_size"] // common["num_attention_heads"])
    return common | rope | _inner(fields) | _experts(fields, "num_experts", False) | kind


def _phi3(fields: Fields) -> Config:
    common = _common(fields)
    if common["head_dim"] * common["num_attention_heads"] != common["hidden_size"]:
        raise fields.refusal(
            "attention.key_length", f"{common['head_dim']}, which is not embedding_length / attention.head_count"
        )
    head_dim, context = common.pop("head_dim"), common["max_position_embeddings"]
    dims = fields.integer("rope.dimension_count", head_dim)
    if not 0 < dims <= head_dim or dims % 2 or int(head_dim * (dims / head_dim)) != dims:
        raise fields.refusal("rope.dimension_count", f"{dims} of {head_dim} dimensions of a head")
    rope = rope_parameters(fields, dims, "longrope")
    window = fields.integer("attention.sliding_window", 0)
    return common | _inner(fields) | {
        "model_type": "phi3",
        "rope_parameters": rope | {"partial_rotary_factor": dims / head_dim},
        "original_max_position_embeddings": rope.get("original_max_position_embeddings", context),
        "sliding_window": window or None,
    }  # fmt: skip


def _gemma(fields: Fields, arch: str, period: int, window: int) -> Config:
    """The settings that Gemma 2 and 3 share: some blocks attend to a sliding window, and attention has a scale of its
    own."""
    common = _common(fields) | _inner(fields)
    layers, heads = common["num_hidden_layers"], common["num_attention_heads"]
    wide = layers == _GEMMA_27B[arch]
    dims = fields.integer("rope.dimension_count", common["head_dim"])
    if dims != common["head_dim"]:
        raise fields.refusal("rope.dimension_count", f"{dims} of {common['head_dim']} dimensions of a head")
    del common["hidden_act"]
    scale = common["hidden_size"] // heads if wide else common["head_dim"]
    given = fields.number("attention.scale", 0.0)
    if given and not math.isclose(given, scale**-0.5, rel_tol=1e-5):
        raise fields.refusal("attention.scale", str(given))
    return common | {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scale,
        "sliding_window": fields.integer("attention.sliding_window", window),
        "layer_types": _layer_types(fields, layers, period),
    }


def _layer_types(fields: Fields, layers: int, period: int) -> list[str]:
    """Whether each block attends to the window or to everything: by the file's list or period, else the last of every
    ``period`` blocks attends to everything."""
    given = fields.value("attention.sliding_window_pattern", period)
    if isinstance(given, list):
        if len(given) != layers:
            raise fields.refusal("attention.sliding_window_pattern", f"{len(given)} values for {layers} blocks")
        windows = [bool(value) for value in given]
    else:
        windows = [bool(given) and i % given < given - 1 for i in range(layers)]
    return ["sliding_attention" if window else "full_attention" for window in windows]


def _gemma2(fields: Fields) -> Config:
    found = _gemma(fields, "gemma2", 2, 4096)
    rope = rope_parameters(fields, found["head_dim"], "linear")
    if fields.number("rope.freq_base_swa", rope["rope_theta"]) != rope["rope_theta"]:
        raise fields.refusal("rope.freq_base_swa", "another base in blocks with a window")
    caps = {"attn_logit_softcapping": fields.number("attn_logit_softcapping", 50.0),
            "final_logit_softcapping": fields.number("final_logit_softcapping", 30.0)}  # fmt: skip
    return found | caps | {"model_type": "gemma2", "rope_parameters": rope}


def _gemma3(fields: Fields) -> Config:
    found = _gemma(fields, "gemma3", 6, 0)
    if not found["sliding_window"]:  # without a window llama.cpp computes full attention in all blocks
        found["sliding_window"] = found["max_position_embeddings"]
        found["layer_types"] = ["full_attention"] * found["num_hidden_layers"]
    local = {"rope_type": "default", "rope_theta": fields.number("rope.freq_base_swa", 10000.0)}
    rope = {"sliding_attention": local, "full_attention": rope_parameters(fields, found["head_dim"], "linear")}
    cap = fields.number("final_logit_softcapping", 0.0) or None
    kind = {"model_type": "gemma3_text", "attn_logit_softcapping": None, "final_logit_softcapping": cap,
            "attention_bias": _biases(fields, _ATTENTION_BIASES), "use_bidirectional_attention": False}  # fmt: skip
    return found | kind | {"rope_parameters": rope}


def _gpt2(fields: Fields) -> Config:
    hidden, heads = _positive(fields, "embedding_length"), _positive(fields, "attention.head_count")
    if (
        hidden % heads
        or fields.integer("attention.head_count_kv", heads) != heads
        or _head_dim(fields, hidden, heads) != hidden // heads
    ):
        raise fields.refusal(
            "attention.head_count", f"{heads} in {hidden} dimensions with fewer keys or another size of heads"
        )
    return {
        "model_type": "gpt2",
        "n_embd": hidden,
        "n_head": heads,
        "n_layer": _positive(fields, "block_count"),
        "n_inner": _positive(fields, "feed_forward_length"),
        "n_positions": _positive(fields, "context_length"),
        "layer_norm_epsilon": fields.number("attention.layer_norm_epsilon"),
        "activation_function": "gelu_new",
    }


FAMILIES: dict[str, Family] = {
    "llama": Family(_llama, permuted=True, zero_biases=_ATTENTION_BIASES + _MLP_BIASES),
    "qwen2": Family(_qwen2),
    "qwen2moe": Family(_qwen2_moe),
    "qwen3": Family(_qwen3, zero_biases=_ATTENTION_BIASES),
    "qwen3moe": Family(_qwen3_moe, zero_biases=_ATTENTION_BIASES),
    "gemma2": Family(_gemma2, norm_plus_one=True),
    "gemma3": Family(_gemma3, norm_plus_one=True, zero_biases=_ATTENTION_BIASES),
    "olmoe": Family(_olmoe),
    "phi3": Family(_phi3),
    "gpt2": Family(_gpt2),
}


def family_of(fields: Fields) -> Family:
    """The row of the header's architecture; CheckpointError where the table has none."""
    found = FAMILIES.get(fields.arch)
    if found is None:
        raise CheckpointError(
            f"leangrid does not read llama.cpp's architecture '{fields.arch}'",
            fields.header.file,
            f"It reads: {', '.join(FAMILIES)}. Give the model's own checkpoint (safetensors and config.json)",
        )
    return found

"""Other configs of a type than its tiny one, as people have them: embeddings tied or not, biases, other counts of
layers, heads and experts, sizes that no group divides, other activations and rotary tables.

``changes(config, seed)`` draws them, ``changed(config, chosen)`` makes the config. A class allows some of them only,
and only the class knows which: whoever builds the model leaves out those with which it does not run."""

import math
import random
import re
from typing import Any, NamedTuple

from transformers import PreTrainedConfig
from zoo_configs import EXPERT_COUNTS, LAYER_COUNTS, VOCAB


class Change(NamedTuple):
    """One difference: in words, and the fields of the text config (``""``) or of the outer one (``outer``) with their
    new values."""

    words: str
    fields: dict[str, Any]
    outer: bool = False


_BIAS = re.compile(r"(?!.*(relative|expert_bias|position|correction)).*bias.*")
# Booleans that say nothing of what a model is made of, or nothing that text sees.
_NOT_A_CHOICE = re.compile(
    r"is_(encoder_)?decoder|is_encoder|add_cross_attention|(output|return)_.*|use_cache|.*(_path|_kernels|use_mambapy|"
    r"associative_scan|export|fp32|float32|upcast.*|flash_attn|mems_.*|weighted_layer_sum|prompt|resampler|optimizations)|"
    r"freeze_.*|summary_.*|classifier_.*|apply_spec_augment|is_folding_model|legacy|tie_word_embeddings|causal|asm|"
    r"sparse_prediction|token_dropout|rescale_prenorm_residual|truncate_seq|disable_ngram_loss|onnx_export|"
    r"aligner_.*|adapter_.*|deterministic_.*|output_router_logits|use_lang_emb|bi_data|same_length"
)
_INNER = re.compile(
    r".*(intermediate_size(_mlp)?|ffn_dim|ffn_hidden_size|feed_forward_size|share_expert_dim)|d_ff|dff|dim_ff|n_inner|"
    r"d_inner|intermediate_dim"
)
_HEADS = re.compile(r"num_attention_heads|n_heads?|num_heads|attention_heads|decoder_attention_heads")
_KEY_HEADS = re.compile(r"num_key_value_heads|num_kv_heads|num_query_groups")
_WIDTH = re.compile(
    r"hidden_size|n_embd|d_model|dim|embed_dim|word_embed_proj_dim|ple_embed_dim|moe_hidden_size|emb_dim"
)
_CHOSEN = re.compile(r"num_experts_per_tok(en)?|moe_topk|moe_k|top_k_experts")
_SHARED = re.compile(r".*shared_experts")
_DENSE_FIRST = re.compile(r"first_k_dense_replace|num_dense_layers|moe_layer_start_index")
_PERIODS = re.compile(
    r"decoder_sparse_step|interleave_moe_layer_step|moe_layer_(freq|interval)|.*_layer_(period|interval)"
)
_ACTIVATION = re.compile(r"(mlp_)?hidden_act(ivation)?|activation(_function)?")
_ROPES: tuple[dict[str, Any], ...] = (
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 128},
    {"rope_type": "dynamic", "factor": 2.0},
)  # fmt: skip
_PAIRS = [1.0 + 0.5 * i for i in range(4)]  # factors of a rotary table, one a pair of a half head of 8
_EXPERTS = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}
_DISENTANGLED = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 64}

# Type -> what published models of it have together, each time another; drawn as one change.
TOGETHER: dict[str, tuple[dict[str, Any], ...]] = {
    "bamba": ({"attn_layer_indices": [1]},),
    "deberta": (_DISENTANGLED,),
    "deberta-v2": (_DISENTANGLED | {"position_buckets": 16, "share_att_key": True, "norm_rel_ebd": "layer_norm",
                                    "position_biased_input": False}, _DISENTANGLED | {"conv_kernel_size": 3,
                                                                                     "conv_act": "gelu"}),
    "deepseek_v2": ({"q_lora_rank": None},
                    {"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1}),
    "deepseek_v3": ({"q_lora_rank": None}, {"n_group": 1, "topk_group": 1}),
    "esm": ({"position_embedding_type": "absolute"},),
    "falcon": ({"alibi": True}, {"new_decoder_architecture": True, "num_kv_heads": 2},
               {"multi_query": False, "num_kv_heads": 4},
               {"parallel_attn": False}),
    "gemma3_text": ({"final_logit_softcapping": 30.0}, {"attn_logit_softcapping": 50.0}),
    "gemma4_text": (_EXPERTS, _EXPERTS | {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0},
                    {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "num_kv_shared_layers": 0}),
    "glm4_moe_lite": ({"q_lora_rank": None},),
    "granitemoehybrid": ({"num_local_experts": 0, "num_experts_per_tok": 0},
                         {"layer_types": ["attention", "attention"], "num_hidden_layers": 2}),
    "gpt_bigcode": ({"multi_query": False},),
    "jamba": ({"num_experts": 1, "num_experts_per_tok": 1},),
    "llama4_text": ({"moe_layers": [1, 3]}, {"moe_layers": []}),
    "mistral": ({"sliding_window": None},),
    "mpt": ({"no_bias": False}, {"attn_config": {"alibi": False, "qk_ln": True}}),
    "nemotron_h": ({"moe_latent_size": 32}, {"layers_block_type": ["linear_attention", "mlp"] * 3}),
    "opt": ({"word_embed_proj_dim": 32, "do_layer_norm_before": False},),
    "phi3": ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0, "long_factor": _PAIRS * 2,
                                  "short_factor": _PAIRS * 2, "original_max_position_embeddings": 256}},),
    "qwen2_moe": ({"mlp_only_layers": [0]},),
    "qwen3_moe": ({"mlp_only_layers": [0]},),
    "qwen3_next": ({"mlp_only_layers": [1]},),
    "t5": ({"feed_forward_proj": "gated-gelu", "is_gated_act": True, "dense_act_fn": "gelu_new"},),
    "udop": ({"feed_forward_proj": "gated-gelu", "is_gated_act": True, "dense_act_fn": "gelu_new"},),
}  # fmt: skip


def changes(config: PreTrainedConfig, seed: int) -> list[Change]:
    """What differs from ``config`` by ``seed``, drawn for each field on its own."""
    draw = random.Random(f"{seed} {config.model_type}")
    text = config.get_text_config(decoder=True)
    fields = plain_fields(text.to_dict())
    values = {**fields, **{k: v for k, v in vars(text).items() if not k.startswith("_")}}
    return [
        *_ties(config, text, draw),
        *_together(text, draw),
        *_booleans(fields, draw),
        *_layers(fields, values, draw),
        *_heads(fields, draw),
        *_widths(fields, draw),
        *_experts(fields, draw),
        *_functions(fields, draw),
    ]


def changed(config: PreTrainedConfig, chosen: list[Change]) -> PreTrainedConfig:
    """A new config with the ``chosen`` differences."""
    fields = plain_fields(config.to_dict())
    text = config.get_text_config(decoder=True)
    key = next((k for k in config.sub_configs if getattr(config, k, None) is text), None)
    for change in chosen:
        places = [fields] if change.outer or key is None else [fields[key]]
        for place in places:
            place.update(change.fields)
    return type(config).from_dict(fields)


def plain_fields(value: Any) -> Any:
    """Infinity as a number, which transformers writes as a dict; all else a copy."""
    if isinstance(value, dict):
        if set(value) == {"__float__"}:
            return float(value["__float__"].replace("Infinity", "inf"))
        return {k: plain_fields(v) for k, v in value.items()}
    return [plain_fields(v) for v in value] if isinstance(value, list) else value


def _ties(config: PreTrainedConfig, text: PreTrainedConfig, draw: random.Random) -> list[Change]:
    tied = draw.random() < 0.5
    words = "tied" if tied else "untied"
    places = [(config, True)] if text is config else [(config, True), (text, False)]
    differ = [outer for place, outer in places if getattr(place, "tie_word_embeddings", tied) is not tied]
    return [Change(words, {"tie_word_embeddings": tied}, outer) for outer in differ]


def _together(text: PreTrainedConfig, draw: random.Random) -> list[Change]:
    chosen = draw.choice([None, *TOGETHER.get(text.model_type, ())])
    return [] if chosen is None else [Change(" ".join(f"{k}={v}" for k, v in chosen.items()), chosen)]


def _booleans(fields: dict[str, Any], draw: random.Random) -> list[Change]:
    """Biases, each with one chance in two; other choices of what a model is made of with one in five."""
    choices = [n for n, value in fields.items() if isinstance(value, bool) and not _NOT_A_CHOICE.fullmatch(n)]
    taken = [name for name in choices if draw.random() < (0.5 if _BIAS.fullmatch(name) else 0.2)]
    return [Change(f"{name}={not fields[name]}", {name: not fields[name]}) for name in taken]


def _layers(fields: dict[str, Any], values: dict[str, Any], draw: random.Random) -> list[Change]:
    """Another count of layers, 1 among them; lists of one entry a layer go on from their beginning or turn."""
    counts = [name for name in LAYER_COUNTS if isinstance(values.get(name), int) and name in fields]
    kinds = fields.get("layers_block_type")
    if not counts and not kinds:
        return []
    old = fields[counts[0]] if counts else len(kinds)
    new, first = (
        draw.choice([1, max(1, old - 1), old + 1, old + 1, old + 2, old + 3]),
        draw.choice([0, 0, 0, 1, old - 1]),
    )
    given: dict[str, Any] = {name: new for name in counts if fields[name] == old}
    for name, value in fields.items():
        if (
            isinstance(value, (list, tuple))
            and len(value) == old
            and not any(isinstance(v, (list, dict)) for v in value)
        ):
            given[name] = [value[(first + i) % old] for i in range(new)]
    turned = f" from entry {first}" if first % old and len(given) > len(counts) else ""
    return [Change(f"layers={new}{turned}", given)] if new != old or turned else []


def _heads(fields: dict[str, Any], draw: random.Random) -> list[Change]:
    """Another count of heads, of heads of keys and values, another width of a head."""
    found = []
    heads = next((name for name in fields if _HEADS.fullmatch(name)), None)
    keys = next((name for name in fields if _KEY_HEADS.fullmatch(name)), None)
    if heads is None or not isinstance(fields[heads], int):
        return []
    old = fields[heads]
    many = draw.choice([old, old, old // 2 or 1, old * 2])
    few = draw.choice([count for count in (1, 2, many // 2, many) if count and many % count == 0])
    given: dict[str, Any] = {} if many == old else {heads: many}
    if keys is not None and isinstance(fields[keys], int) and (fields[keys] != few):
        given[keys] = few
    if given:
        found.append(Change(" ".join(f"{name}={value}" for name, value in given.items()), given))
    width = draw.choice([None, 8, 24, 32])
    if isinstance(fields.get("head_dim"), int) and width and width != fields["head_dim"]:
        found.append(Change(f"head_dim={width}", {"head_dim": width}))
    return found


def _widths(fields: dict[str, Any], draw: random.Random) -> list[Change]:
    """Inner sizes that no group divides, another hidden size, a vocabulary of an odd size."""
    found = []
    for name, value in fields.items():
        if _INNER.fullmatch(name) and value:
            sizes = [36, 40, 56] if "moe" in name or "expert" in name else [90, 100, 120, 136]
            new = draw.choice(sizes)
            if draw.random() < 0.7:
                same = isinstance(value, (list, tuple))
                found.append(Change(f"{name}={new}", {name: [new] * len(value) if same else new}))
    hidden, vocab = draw.choice([None, 80, 96, 144]), draw.choice([0, 1, 3, 5, 37])
    wide = {name: hidden for name, value in fields.items() if _WIDTH.fullmatch(name) and value == 64}
    if hidden and wide:
        found.append(Change(f"hidden={hidden}", wide))
    words = {name: VOCAB + vocab for name, value in fields.items() if "vocab" in name and value == VOCAB}
    if vocab and words:
        found.append(Change(f"vocab={VOCAB + vocab}", words))
    return found


def _experts(fields: dict[str, Any], draw: random.Random) -> list[Change]:
    """Other counts of experts, of those that see a token, of shared ones, of dense layers before them."""
    found = []
    many = draw.choice([2, 3, 6, 12])
    for names, counts in (
        (re.compile("|".join(EXPERT_COUNTS)), [many]),
        (_CHOSEN, [1, 2, 3] if many > 2 else [1, 2]),
        (_SHARED, [0, 1, 2, 3]),
        (_DENSE_FIRST, [0, 1, 2]),
        (_PERIODS, [1, 2]),
    ):
        for name, value in fields.items():
            if isinstance(value, int) and not isinstance(value, bool) and names.fullmatch(name):
                new = draw.choice(counts)
                if new != value:
                    found.append(Change(f"{name}={new}", {name: new}))
    kinds = fields.get("mlp_layer_types")
    if isinstance(kinds, list) and len(set(kinds)) > 1 and draw.random() < 0.3:
        found.append(Change("mlp_layer_types turned", {"mlp_layer_types": kinds[::-1]}))
    return found


def _functions(fields: dict[str, Any], draw: random.Random) -> list[Change]:
    """Another activation, another window of attention, another rotary table."""
    found = []
    for name, value in fields.items():
        if _ACTIVATION.fullmatch(name) and isinstance(value, str) and draw.random() < 0.3:
            new = draw.choice([one for one in ("silu", "gelu", "gelu_pytorch_tanh", "relu") if one != value])
            found.append(Change(f"{name}={new}", {name: new}))
    window = draw.choice([0, 0, 4, 8, None])
    if isinstance(fields.get("sliding_window"), int) and window != 0:
        found.append(Change(f"sliding_window={window}", {"sliding_window": window}))
    rope, other = fields.get("rope_parameters"), draw.choice([None, None, *_ROPES])
    if other and isinstance(rope, dict) and rope.get("rope_type") == "default" and math.isfinite(rope["rope_theta"]):
        found.append(Change(f"rope {other['rope_type']}", {"rope_parameters": {**rope, **other}}))
    return found

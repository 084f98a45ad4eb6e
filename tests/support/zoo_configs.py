"""Small configs of every model type of transformers, from its config class alone.

``tiny_config(model_type)`` makes the config with its defaults, sees by their names which attributes are sizes, and
makes it again with small ones, sub-configs first. What names do not say is in EXCEPTIONS, one entry a type."""

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

HIDDEN, INNER, HEADS, HEAD, NARROW = 64, 128, 4, 16, 32  # NARROW: ranks and experts, still a group of 32 columns
FIRST_ID, TEXT_IDS = 8, 512  # tokens of text; those of images and the like come behind
VOCAB = TEXT_IDS + 128
MOST_LAYERS = 8

# Name of an attribute -> its largest value; the first match counts.
_RULES: tuple[tuple[re.Pattern[str], int], ...] = tuple(
    (re.compile(pattern), most)
    for pattern, most in (
        (r"type_vocab_size|n_langs|num_random_blocks|num_hashes", 2),
        (r"vocab_offset", TEXT_IDS),
        (r".*vocab.*", VOCAB),
        (r"max_.*position.*|n_positions|n_ctx|max_seq_len|context_length|.*_positions", 512),
        (r"original_max_position_embeddings", 512),
        (r"num_position_embeddings|position_embedding_size|mm_posemb_size", 64),
        # layers
        (r"(num_|n_)?(hidden_|encoder_|decoder_)?layers?|depth|num_blocks|conf_num_hidden_layers", 2),
        (r"num_global_layers|resampler_depth", 2),
        (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index|prefix_dense_sliding_window_pattern", 1),
        (r"(attn|expert)_layer_period|attn_layer_offset|expert_layer_offset|cross_layer_interval", 2),
        (r"num_kv_shared_layers|num_mtp_layers|num_nextn_predict_layers|mtp_num_hidden_layers", 2),
        (r"max_window_layers|aligner_num_add_layers", 1),
        # attention
        (r"linear_num_key_heads|index_n_heads|indexer_n_heads|.*num_key_value_heads|.*kv_heads", 2),
        (r".*n_mamba_heads|mamba_n_?groups|n_groups|num_groups|o_groups", 2),
        (r"mamba_n(um)?_heads|mamba_num_heads", 8),
        (r".*(attention_heads|n?_?heads|n_heads?|num_heads)", HEADS),
        (r"qk_rope_head_dim|rotary_dim|d_rel", HEAD // 2),
        (r"qk_head_dim", HEAD + HEAD // 2),
        (r".*head_dim.*|d_kv|dim_head|.*head_size|kv_channels|d_head|mamba_d_head|resampler_dim_head", HEAD),
        (r"mamba_d_ssm|lru_width|attention_hidden_size", HIDDEN * 2),
        (r"(mamba_d_|ssm_)?state(_size)?|state_size", HEAD),
        (r".*_rank|.*lowrank|time_step_rank", NARROW),
        (r".*chunk_(size|length)|sliding_window(_size)?|attention_window_size|local_attention.*", 16),
        (r"window_size|keep_window_size|sliding_window_pattern|layer_group_size|n_layers_per_attn_res_block", 16),
        (r"mem_len|rel_extent", 16),
        (r"(index|indexer)_(topk|budget)|index_topk_blocks|index_(block_size|kpool)", 8),
        # experts
        (r"num_experts_per_tok|moe_topk|moe_k|top_k_experts|num_experts_per_token|n_group", 2),
        (r"topk_group|.*num_shared_experts|n_shared_experts|num_experts_shared", 1),
        (r"num_experts|n_routed_experts|num_local_experts|moe_num_experts|zero_expert_num", 4),
        # widths
        (r".*moe_intermediate_size|expert_ffn_hidden_size|moe_latent_size|router_hidden_size", NARROW),
        (r".*(intermediate_size(_mlp)?|ffn_dim|ffn_hidden_size|feed_forward_size|shared_expert.*)", INNER),
        (r".*(share_expert_dim|mlp_dim|mlp_hidden_size)|d_ff|dff|dim_ff|n_inner|d_inner|intermediate_dim", INNER),
        (r"hidden_size_per_layer_input|per_layer_.*dim|ple_embed_dim", NARROW),
        (r".*(hidden_(size|dim).*|d_model|n_embd|emb(ed)?_dim|embed(ding)?_(size|dim))", HIDDEN),
        (r".*(proj(ection|ector)?_dims?|input_size|input_dim)|mm_embed_dim|audio_embed_dim", HIDDEN),
        (r"(out|in)put_(dim|size|channels)|output_proj_dims|.*_out_channel|.*_conv_channels", HIDDEN),
        (r"vision_output_dim|projector_(in|out)put_dim|adapter_(in|out)_dim|hidden_channels", HIDDEN),
        (r".*_(in|mid|out)_channels|dim_model_base|out_hidden_size|text_hidden_size|vision_hidden_size", HIDDEN),
        (r"word_embed_proj_dim|latent_channels|base_channels|codebook_dim|num_filters|projector_.*", HIDDEN),
        (r"num_embeddings|codebook_size|num_centroids", 64),
        (r"split_ngram_parts|make_ngram_vocab_size_divisible_by|num_quantizers|upsample_groups", 4),
        # pictures and sounds: built, not run
        (r"image_size|max_im(a)?ge?_size|min_image_size|crop_size|resolution", 32),
        (r"patch_size", 8),
        (r"num_patches|max_num_patches|seq_len|max_source_positions|num_image_tokens|image_seq_length", 64),
        (r"mm_tokens_per_image", 64),
    )
)
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "layers")
EXPERT_COUNTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
_SPECIAL_TOKEN = re.compile(
    r".*(_token_id|_token_index|_token_ids?|(im|image|slice|video|newline)_.*id|im_.*_id)"
)  # ids of tokens that text never has
_NOT_A_SIZE = re.compile(r".*(_token_id|_token_index|_id|_index)")
_UNSET = {"head_dim": HEAD, "num_key_value_heads": HEADS, "num_experts_per_tok": 2}  # where the default is None

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_MOE = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
        "first_k_dense_replace": 1}  # fmt: skip
_TWO_KINDS = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4}
_GEMMA4 = {"global_head_dim": 2 * HEAD, "num_kv_shared_layers": 2, **_TWO_KINDS}
_NO_LAYER_EMBEDDINGS = {"text_config.hidden_size_per_layer_input": 0, "text_config.vocab_size_per_layer_input": 0}
_ZAMBA = {"layers_block_type": ["linear_attention", "hybrid"] * 3, "num_hidden_layers": 6}
_CONVOLUTIONS = {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1], "num_hidden_layers": 4}

# Type -> attributes that names do not settle; "sub.attribute" reaches into a sub-config.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "axk2": {"gated_norm_rank": 8},
    "chameleon": {"vocabulary_map": {"<image>": TEXT_IDS + 44}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {**_ROPE, "mrope_section": [4, 2, 2]}}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
             "ffn_config": {"ffn_hidden_size": NARROW, "moe_top_k": 2}},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], **_MOE},
    "deepseek_v2": _MOE,
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": NARROW},
    "distilbert": {"dim": HIDDEN},
    "dots1": _MOE,
    "dots3_note_text": {"num_attention_heads": 8, "num_key_value_heads": 8,  # a gate a head, of 64 or more
                        "swa_num_attention_heads": 8, "swa_num_key_value_heads": 8, "swa_q_lora_rank": NARROW,
                        "swa_kv_lora_rank": NARROW, "swa_head_dim": 24, "swa_qk_nope_head_dim": 16,
                        "swa_v_head_dim": 16},
    "emu3": {"vocabulary_map": {"<image>": TEXT_IDS + 44}},
    "ernie4_5_vl_moe_text": {"rope_parameters": {**_ROPE, "mrope_section": [3, 3, 2]}},
    "esm": {"vocab_size": VOCAB, "pad_token_id": 1, "mask_token_id": 2, "position_embedding_type": "rotary"},
    "evolla": {"protein_encoder_config": {"hidden_size": HIDDEN, "num_hidden_layers": 2,
                                          "num_attention_heads": HEADS, "intermediate_size": INNER}},
    "florence_vision": {"embed_dim": [16, 16, 32, 32], "depths": [1, 1, 1, 1], "num_heads": [2] * 4,
                        "num_groups": [2] * 4, "projection_dim": HIDDEN},
    "gemma3n_text": {**_TWO_KINDS, "num_kv_shared_layers": 2, "intermediate_size": [INNER] * 4,
                     "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0]},
    "gemma4_text": _GEMMA4,
    "gemma4_assistant": {**_NO_LAYER_EMBEDDINGS, "text_config.num_kv_shared_layers": 4},
    "gemma4_unified_text": _GEMMA4,
    "gpt_oss": {"num_experts_per_tok": 2},
    "granite4_vision": {"downsample_rate": "1/2", "deepstack_layer_map": [[-1, 0]],
                        "spatial_target_layers": [1, 1, 1, 1]},
    "inkling2_text": {"num_attention_heads": 8, "swa_num_attention_heads": 8},  # a sink a head, of 48 in real size
    "jamba": {"attn_layer_period": 3, "attn_layer_offset": 1, "num_hidden_layers": 4},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"], "num_hidden_layers": 4},
    "mamba2": {"num_heads": 8},
    "mobilebert": {"embedding_size": NARROW, "true_hidden_size": NARROW, "intra_bottleneck_size": NARROW},
    "molmo2": {"adapter_config.vision_feature_layer": [1, 0]},
    "moshi": {"num_codebooks": 4},
    "muse_spark_audio": _CONVOLUTIONS,
    "musicgen_decoder": {"num_codebooks": 1},
    "musicgen_melody_decoder": {"num_codebooks": 1},
    "perception_lm": {"vision_config.model_args": {"embed_dim": HIDDEN}},
    "phi3": {"pad_token_id": 0},
    "qwen4_exp_text": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": HEAD, "indexer_budget": 8,
                       "indexer_compress_ratio": 4, "ple_layer_ids": [1], "ple_embed_dim": HIDDEN,
                       "eos_token_id": 2, "num_hidden_layers": 4},
    "reformer": {"axial_pos_shape": [16, 16], "axial_pos_embds_dim": [32, 32], "num_buckets": 4},
    "step3p5": {"sliding_window": 16, "layer_types": ["full_attention", "sliding_attention"] * 2,
                "num_hidden_layers": 4},
    "xmod": {"default_language": "en_XX"},
    "zamba": _ZAMBA,
    "zamba2": {**_ZAMBA, "num_mem_blocks": 2},
}  # fmt: skip

# Type -> why more than a tenth of its blocks' matrices stay in 16 bits.
_CROSS = "cross attention is not reached by text alone"
_APART = "a part of its matrices lies in parameters that no linear holds"
PARTLY: dict[str, str] = {
    **dict.fromkeys(
        ("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "blip", "evolla", "marian", "mbart", "musicgen",
         "mvp", "pegasus", "pix2struct", "plbart", "pp_formulanet", "prophetnet", "trocr", "vision-encoder-decoder",
         "whisper"), _CROSS),
    **dict.fromkeys(("dbrx", "deepseek_v4", "funnel", "glm5_next", "recurrent_gemma", "xlnet"), _APART),
    "ernie4_5_vl_moe": "the experts of pictures see no text",
    "longformer": "the linears of global attention see no token of plain text",
    **dict.fromkeys(("diffusion_gemma", "zamba", "zamba2"), "several of its blocks are one set of weights"),
}  # fmt: skip

# (family, type) -> why transformers 5.23 does not open its affine result; it opens the dense export.
_CUT = "it cuts a stored tensor in several only where none of a model is packed"
_KEPT_EXPERTS = "beside packed weights it does not find the experts that stay dense"
NOT_PLAIN: dict[tuple[str, str], str] = {
    ("causal", "hrm_text"): _CUT,
    (
        "causal",
        "longcat_flash",
    ): "packed experts do not fill its first tensor, which has room for those that do nothing",
    ("image-text", "ernie4_5_vl_moe"): _KEPT_EXPERTS,
    ("image-text", "molmo2"): _CUT,
    ("image-text", "qianfan_ocr"): _CUT,
}
# (family, type) -> words of the sentence with which leangrid refuses it.
REFUSED: dict[tuple[str, str], str] = {
    ("image-text", "diffusion_gemma"): "tied to each other",
    ("image-text", "idefics"): "text alone",
    ("image-text", "pi0"): "text alone",
}
# Type -> why transformers 5.23 cannot make it.
BROKEN = {"gemma4_assistant": "its config refuses every number of layers with shared keys, also the one it asks for"}


def tiny_config(model_type: str, decoder: bool = False) -> PreTrainedConfig:
    """A config of ``model_type`` with small sizes and every kind of layer that its default has."""
    config = _tiny(CONFIG_MAPPING[model_type], [], {})
    config.use_cache = False
    if hasattr(config, "is_decoder"):
        config.is_decoder = decoder
    return config


def real_config(model_type: str, decoder: bool = False) -> PreTrainedConfig:
    """The default config with the layers and experts of the tiny one: its widths are real (for the meta device)."""
    tiny, config = tiny_config(model_type, decoder), CONFIG_MAPPING[model_type]()
    subs = [key for key in config.sub_configs if getattr(config, key, None) is not None]
    for small, large in [(tiny, config), *((getattr(tiny, key), getattr(config, key)) for key in subs)]:
        for name, value in list(vars(large).items()):
            new = vars(small).get(name)
            counted = name in (*LAYER_COUNTS, "encoder_layers", "depth", *EXPERT_COUNTS)
            if new is not None and (counted or (isinstance(value, list) and isinstance(new, list))):
                object.__setattr__(large, name, new)
    return config


def _limit(name: str, value: Any) -> int | None:
    """The small value of an attribute, or None where it is no size."""
    if isinstance(value, bool) or not isinstance(value, int) or _NOT_A_SIZE.fullmatch(name) or value <= 0:
        return None
    return next((min(value, most) for pattern, most in _RULES if pattern.fullmatch(name)), None)


def _tiny(
    kind: type[PreTrainedConfig], special: list[int], overrides: dict[str, Any], given: dict[str, Any] | None = None
) -> PreTrainedConfig:
    """A small instance of a config class; sub-configs first. ``special`` collects the tokens that text never has."""
    given = given or {}
    mine = EXCEPTIONS.get(kind.model_type, {}) | overrides
    fields: dict[str, Any] = {}
    for key, spec in getattr(kind, "sub_configs_defaults", {}).items():  # older transformers have none
        own = {k.removeprefix(f"{key}."): v for k, v in mine.items() if k.startswith(f"{key}.")}
        if key in mine:
            fields[key] = mine[key]
        elif not spec.optional:
            fields[key] = _sub_config(spec, special, own)
    plain = {k: v for k, v in mine.items() if "." not in k}
    known = {f.name for f in dataclasses.fields(kind)}  # pyright: ignore[reportArgumentType]
    default = _instance(kind, {**given, **fields})
    values: dict[str, Any] = dict(vars(default)) if default is not None else kind.default_config_fields()
    for field, stored in kind.attribute_map.items():  # a field that is kept under another name
        if field in known and stored in values and stored not in known:
            values[field] = values.pop(stored)
    fields |= _small_sizes(values, known)
    heads = values.get("num_attention_heads")
    if heads and values.get("num_key_value_heads") == heads and "num_key_value_heads" in fields:
        fields["num_key_value_heads"] = fields.get("num_attention_heads", heads)
    for name, value in values.items():
        if _SPECIAL_TOKEN.fullmatch(name) and type(value) is int and value >= FIRST_ID:
            special.append(value)
            fields[name] = TEXT_IDS + 8 + len(special) % 48
    fields |= _layers(default, {**fields, **plain})
    fields |= _rope(kind, default, fields)
    return kind(**{**given, **fields, **plain})


def _small_sizes(values: dict[str, Any], known: set[str]) -> dict[str, Any]:
    """The sizes among ``values`` that get smaller, and those that have to be given; others follow from the fields."""
    small = {name: _limit(name, value) for name, value in values.items() if name in known}
    fields: dict[str, Any] = {name: size for name, size in small.items() if size is not None and size != values[name]}
    fields |= {name: size for name, size in _UNSET.items() if name in known and values.get(name, 0) is None}
    if values.get("head_dim") and values.get("head_dim") == values.get("qk_rope_head_dim") and "head_dim" in known:
        fields["head_dim"] = fields["qk_rope_head_dim"]
    return fields


def _sub_config(spec: Any, special: list[int], overrides: dict[str, Any]) -> PreTrainedConfig:
    kind = spec.config_class
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedConfig)):
        kind = CONFIG_MAPPING[overrides.get("model_type") or spec.model_type]
    return _tiny(kind, special, overrides, spec.init_kwargs)


def _instance(kind: type[PreTrainedConfig], fields: dict[str, Any]) -> PreTrainedConfig | None:
    try:
        return kind(**fields)
    except Exception:  # whatever its own checks raise: the defaults alone are no config then
        return None


def _layers(default: PreTrainedConfig | None, fields: dict[str, Any]) -> dict[str, Any]:
    """As few layers as show every kind that the default has: a prefix, or its lists cut to one of each kind."""
    values = vars(default) if default is not None else {}
    counts = [name for name in LAYER_COUNTS if isinstance(values.get(name), int)]
    if not counts:
        return {}
    total = values[counts[0]]
    lists = {
        name: list(value)
        for name, value in values.items()
        if isinstance(value, (list, tuple)) and len(value) == total > 1 and name not in fields
        if all(isinstance(v, (str, int, bool, float)) for v in value)
    }
    kinds = list(zip(*lists.values(), strict=True)) if lists else []
    if len(set(kinds)) < 2:
        return {name: 2 for name in counts if name not in fields or fields[name] > 2}
    first = sorted(kinds.index(kind) for kind in set(kinds))
    prefix = max(2, first[-1] + 1)
    if prefix <= MOST_LAYERS:
        return {counts[0]: prefix} | {name: value[:prefix] for name, value in lists.items()}
    chosen = first[:MOST_LAYERS]
    return {counts[0]: len(chosen)} | {name: [value[i] for i in chosen] for name, value in lists.items()}


def _rope(kind: type[PreTrainedConfig], default: PreTrainedConfig | None, fields: dict[str, Any]) -> dict[str, Any]:
    """Sections of a rotary table that fit the small heads, and a base where the default has none."""
    values = vars(default) if default is not None else {}
    rope = values.get("rope_parameters")
    if not isinstance(rope, dict) or any(isinstance(v, dict) for v in rope.values()):
        return {}
    rope = dict(rope)
    if rope.get("rope_theta") is None and rope.get("rope_type"):
        rope["rope_theta"] = 10000.0
    if "mrope_section" in rope or _asks_for_sections(kind):
        head = fields.get("head_dim", values.get("head_dim"))
        head = head or fields.get("hidden_size", HIDDEN) // fields.get("num_attention_heads", HEADS)
        half = int(head * (rope.get("partial_rotary_factor") or 1.0)) // 2
        side = (half * 3 // 4) // 2
        rope["mrope_section"] = [half - 2 * side, side, side]
    return {"rope_parameters": rope} if rope != values.get("rope_parameters") else {}


def _asks_for_sections(kind: type[PreTrainedConfig]) -> bool:
    """Whether the model of a text config reads ``mrope_section``, which its default lacks."""
    name, module = kind.__name__.lower(), inspect.getmodule(kind)
    if "vision" in name or "audio" in name or module is None:
        return False
    source = Path(str(module.__file__).replace("configuration_", "modeling_"))
    return source.is_file() and '"mrope_section"' in source.read_text(encoding="utf-8")

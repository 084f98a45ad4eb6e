"""Tiny random models of every architecture, from transformers' own config classes, written as real checkpoints.

Two blocks, hidden 64, vocabulary 512: one is built and saved in about 50 ms, the same numbers for the same seed.
Biases, norms and embeddings are random too, so that code which forgets one of them gives other logits. The tokenizer is
a real byte-level BPE, trained on English text that ships with Python."""

import json
import pydoc_data.topics
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
import transformers as hf
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB, HIDDEN, INTERMEDIATE, BLOCKS, POSITIONS = 512, 64, 128, 2, 512
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")  # ids 0..3

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.1,
}
_GQA = {**_COMMON, "num_key_value_heads": 2}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def _llama(**fields: object) -> hf.PreTrainedConfig:
    return hf.LlamaConfig(**{**_GQA, **fields})


def _gemma3() -> hf.PreTrainedConfig:
    windows = ["sliding_attention", "full_attention"]
    return hf.Gemma3TextConfig(**_GQA, head_dim=16, query_pre_attn_scalar=16, sliding_window=16, layer_types=windows)


def _opt() -> hf.PreTrainedConfig:
    names = {k: v for k, v in _COMMON.items() if k not in ("intermediate_size", "initializer_range")}
    return hf.OPTConfig(**names, ffn_dim=INTERMEDIATE, word_embed_proj_dim=HIDDEN, dropout=0.0, init_std=0.1)


def _gpt2() -> hf.PreTrainedConfig:
    tokens = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return hf.GPT2Config(
        **tokens, n_embd=HIDDEN, n_layer=BLOCKS, n_head=4, n_positions=POSITIONS, initializer_range=0.1
    )


CONFIGS: dict[str, Callable[[], hf.PreTrainedConfig]] = {
    "llama1": lambda: _llama(num_key_value_heads=4, tie_word_embeddings=False),
    "llama2": lambda: _llama(tie_word_embeddings=False),
    "llama3": lambda: _llama(rope_parameters=_LLAMA3_ROPE, tie_word_embeddings=False),
    "llama3_tied": lambda: _llama(rope_parameters=_LLAMA3_ROPE, tie_word_embeddings=True),
    "mistral": lambda: hf.MistralConfig(**_GQA, sliding_window=16),
    "qwen2": lambda: hf.Qwen2Config(**_GQA, tie_word_embeddings=True),
    "qwen3": lambda: hf.Qwen3Config(**_GQA, head_dim=32),
    "gemma2": lambda: hf.Gemma2Config(**_GQA, head_dim=16, query_pre_attn_scalar=16, sliding_window=16),
    "gemma3": _gemma3,
    "phi3": lambda: hf.Phi3Config(**_GQA, original_max_position_embeddings=POSITIONS),
    "opt": _opt,
    "gpt2": _gpt2,
    "bert": lambda: hf.BertConfig(**_COMMON),
}
NAMES = tuple(CONFIGS)

_MOE = {**_GQA, "moe_intermediate_size": 32, "num_experts_per_tok": 2, "tie_word_embeddings": False}
_MLA = {"kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "num_key_value_heads": 4,
        "first_k_dense_replace": 1, "n_shared_experts": 1, "n_routed_experts": 4}  # fmt: skip
# Mixtures of experts; beyond the first block of DeepSeek's and the second of Qwen2's every block has one.
MIXTURES: dict[str, Callable[[], hf.PreTrainedConfig]] = {
    "mixtral": lambda: hf.MixtralConfig(**_GQA, num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=False),
    "qwen2_moe": lambda: hf.Qwen2MoeConfig(
        **_MOE, num_experts=4, shared_expert_intermediate_size=64, mlp_only_layers=[1]
    ),
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(**_MOE, num_experts=4, head_dim=16, norm_topk_prob=True),
    "olmoe": lambda: hf.OlmoeConfig(**_GQA, num_experts=4, num_experts_per_tok=2, tie_word_embeddings=False),
    "deepseek_v2": lambda: hf.DeepseekV2Config(
        **_MOE | _MLA, q_lora_rank=None, n_group=1, topk_group=1, topk_method="greedy"
    ),
    "deepseek_v3": lambda: hf.DeepseekV3Config(**_MOE | _MLA, q_lora_rank=32, n_group=2, topk_group=1, head_dim=8),
}
CONFIGS |= MIXTURES


def _gemma3n() -> hf.PreTrainedConfig:
    """Four blocks, the last two with keys and values of the first two; embeddings a layer, two residual streams."""
    return hf.Gemma3nTextConfig(
        **_GQA | {"num_hidden_layers": 4, "intermediate_size": [INTERMEDIATE] * 4},
        head_dim=16,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=2,
        laurel_rank=16,
        hidden_size_per_layer_input=16,
        vocab_size_per_layer_input=VOCAB,
        altup_num_inputs=2,
        activation_sparsity_pattern=[0.0] * 4,
    )


def gpt_oss(**fields: object) -> hf.PreTrainedConfig:
    """Experts that its checkpoints, too, hold all in one: transposed, gate and up interleaved, with biases."""
    more: dict[str, object] = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}
    more |= {"layer_types": ["full_attention"] * BLOCKS, "tie_word_embeddings": False}
    return hf.GptOssConfig(**{**_GQA, **more, **fields})


CONFIGS["gpt_oss"] = gpt_oss


# Models in which more flows between the blocks than hidden states, or whose blocks are called again.
FLOWING: dict[str, Callable[[], hf.PreTrainedConfig]] = {
    "gemma3n": _gemma3n,
    "albert": lambda: hf.AlbertConfig(**_COMMON | {"num_hidden_layers": 3, "embedding_size": 32}),
}
CONFIGS |= FLOWING
ENCODERS = ("bert", "albert")


@cache
def tokenizer() -> hf.PreTrainedTokenizerFast:
    """A byte-level BPE with VOCAB entries, trained on the text of Python's own help topics."""
    bpe = Tokenizer(models.BPE(unk_token=SPECIAL[3]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(sorted(pydoc_data.topics.topics.values())[:40], trainer)
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    return hf.PreTrainedTokenizerFast(tokenizer_object=bpe, **names)


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> hf.PreTrainedModel:
    """The model ``name`` (one of NAMES) in evaluation mode, every parameter random, the same for the same seed."""
    config = CONFIGS[name]()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        kind = hf.AutoModel if name in ENCODERS else hf.AutoModelForCausalLM
        model = kind.from_config(config, dtype=torch.float32).eval()
        model.requires_grad_(False)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            parameter.data = parameter.data.to(
                dtype
            )  # parameters only: from_pretrained keeps rotary buffers in float32
    return model


def save(
    name: str, directory: Path | str, dtype: torch.dtype = torch.float32, seed: int = 0, sharded: bool = False
) -> Path:
    """Write ``name`` with its tokenizer as a checkpoint directory; ``sharded`` gives several shards and an index."""
    directory = Path(directory)
    model = build(name, dtype, seed)
    hf.utils.logging.disable_progress_bar()
    model.save_pretrained(directory, max_shard_size=64 * 1024 if sharded else "5GB")
    tokenizer().save_pretrained(directory)
    return directory


def tokens(windows: int = 4, length: int = 32, seed: int = 0) -> torch.Tensor:
    """Random token ids, int64 [windows, length], no special tokens."""
    return torch.randint(len(SPECIAL), VOCAB, (windows, length), generator=torch.Generator().manual_seed(seed))


def synthetic(
    directory: Path | str, blocks: int = 24, hidden: int = HIDDEN, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Path:
    """Write a Llama of ``blocks`` blocks, one shard a block, never holding more than one block: for tests of peak
    memory."""
    directory, generator = Path(directory), torch.Generator().manual_seed(seed)
    directory.mkdir(parents=True, exist_ok=True)
    config = _llama(
        num_hidden_layers=blocks, hidden_size=hidden, intermediate_size=3 * hidden, tie_word_embeddings=True
    )
    config.architectures, config.dtype = ["LlamaForCausalLM"], dtype
    config.save_pretrained(directory)
    tokenizer().save_pretrained(directory)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).mul_(shape[-1] ** -0.5).to(dtype)

    linears = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden // 2, hidden),
        "self_attn.v_proj": (hidden // 2, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (3 * hidden, hidden),
        "mlp.up_proj": (3 * hidden, hidden),
        "mlp.down_proj": (hidden, 3 * hidden),
    }
    index: dict[str, str] = {}
    total = 0
    for number in range(blocks + 1):
        if number < blocks:
            prefix = f"model.layers.{number}."
            shard = {f"{prefix}{linear}.weight": random(*shape) for linear, shape in linears.items()}
            shard |= {
                f"{prefix}{norm}.weight": torch.ones(hidden, dtype=dtype)
                for norm in ("input_layernorm", "post_attention_layernorm")
            }
        else:
            shard = {
                "model.embed_tokens.weight": random(VOCAB, hidden),
                "model.norm.weight": torch.ones(hidden, dtype=dtype),
            }
        file = f"model-{number + 1:05d}-of-{blocks + 1:05d}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        index |= dict.fromkeys(shard, file)
        total += sum(tensor.nbytes for tensor in shard.values())
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    (directory / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return directory

"""One token of a Llama-like model without Python between its layers: the weights of transformers' model, computed by
kernels/cpu/step.h.

The model's own forward pass reads the prompt and computes the same; both write the same cache.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from leangrid.inference.layers import PackedLinear
from leangrid.kernels import packed

Step = Callable[[int, int], Tensor]

# Llama's block: RMSNorm, rotary attention, RMSNorm, SwiGLU. Qwen3 also normalises queries and keys.
_MODELS = frozenset({"llama", "mistral", "qwen2", "qwen3"})
_ROPES = frozenset({"default", "linear", "llama3", "yarn"})  # those whose angles depend on the position alone
_LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def native_step(model: nn.Module, keys: list[Tensor], values: list[Tensor]) -> Step | None:
    """A function ``step(token, position)`` that returns the logits, float32 [vocabulary], and adds the token to the
    cache.

    Args:
        model: a causal model of transformers, in evaluation mode.
        keys, values: the cache of each layer, float32 [1, kv_heads, capacity, head_dim], filled before ``position``.

    Returns:
        None where the model's forward pass has to be used: another architecture, device or dtype, a sliding window
        shorter than the cache, or no native kernels.
    """
    config: Any = model.config
    if not _fits(model, config, keys):
        return None
    base: Any = model.get_submodule("model")
    capacity, head_dim = keys[0].shape[2:]
    cos, sin = base.rotary_emb(torch.zeros(1), torch.arange(capacity)[None])
    if cos.shape[-1] != head_dim:  # only a part of each head is rotated
        return None
    matrices: dict[int, Any] = {}
    step = packed.new_step(
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        keys[0].shape[1],
        head_dim,
        capacity,
        config.rms_norm_eps,
        base.layers[0].self_attn.scaling,
    )
    for layer, key, value in zip(base.layers, keys, values, strict=True):
        linears = [_matrix(layer.get_submodule(name), matrices) for name in _LINEARS]
        norms = [layer.input_layernorm, layer.post_attention_layernorm]
        norms += [layer.self_attn.q_norm, layer.self_attn.k_norm] if hasattr(layer.self_attn, "q_norm") else []
        step.add_block(linears, [norm.weight.detach() for norm in norms], key[0], value[0])
    head: Any = model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    vocabulary = len(head.weight)
    step.finish(base.norm.weight.detach(), _matrix(head, matrices), vocabulary)
    embedding, logits = base.embed_tokens.weight.detach(), torch.empty(vocabulary)
    angles = cos[0].float().contiguous(), sin[0].float().contiguous()

    def run(token: int, position: int) -> Float[Tensor, " vocab"]:
        packed.run_step(step, embedding[token], angles[0][position], angles[1][position], position, logits)
        return logits

    return run


def _fits(model: nn.Module, config: Any, keys: list[Tensor]) -> bool:
    cached = all(
        key.dtype == torch.float32 and key.device.type == "cpu" and key.is_contiguous() and len(key) == 1
        for key in keys
    )
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    rope = getattr(config, "rope_parameters", None) or {}
    plain = config.model_type in _MODELS and config.hidden_act == "silu" and rope.get("rope_type", "default") in _ROPES
    if not (plain and keys and cached and packed.can_step()) or (window is not None and window < keys[0].shape[2]):
        return False
    base: Any = model.get_submodule("model")
    if not all(_readable(layer.get_submodule(name)) for layer in base.layers for name in _LINEARS):
        return False
    own = (base.embed_tokens, base.norm, *(module for layer in base.layers for module in layer.modules()))
    return all(
        p.dtype == torch.float32 and p.device.type == "cpu" for module in own for p in module.parameters(recurse=False)
    )


def _readable(layer: nn.Module) -> bool:
    """Whether a layer is a plain linear or a packed one in the CPU kernels' layout; a wrapper around one may compute
    something else."""
    return type(layer) is nn.Linear or (isinstance(layer, PackedLinear) and layer.codes.dtype == torch.uint8)


def _matrix(layer: nn.Module, done: dict[int, Any]) -> Any:
    """The extension's view of a layer's weight; a plain one in bfloat16 where that is exact, which halves its bytes.

    ``done`` holds the views that were already made, by the layer's id."""
    if isinstance(layer, PackedLinear):
        return layer.matrix()
    if id(layer) not in done:
        weight, bias = layer.get_parameter("weight").detach(), layer.bias
        done[id(layer)] = packed.dense_matrix(_narrow(weight), bias)  # pyright: ignore[reportArgumentType]
    return done[id(layer)]


def _narrow(weight: Tensor) -> Tensor:
    """``weight`` in bfloat16 if that is exact, else in float32."""
    narrow = torch.empty_like(weight, dtype=torch.bfloat16)
    for start in range(0, len(weight), 256):  # pieces that stay in the cache
        part = weight[start : start + 256]
        short = part.bfloat16()
        if not torch.equal(short.to(weight.dtype), part):
            return weight.float()
        narrow[start : start + 256] = short
    return narrow

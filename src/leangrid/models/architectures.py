"""The architectures leangrid knows: one row each.

A row says where the blocks are and which linears read the same input, in the order the block calls them. Linears of one
group share their Hessian and its factor; a later group sees the already quantized earlier ones ("true-sequential").
To add an architecture, add its row here and a tiny model of it in tests/tiny_models.py: the walk needs nothing else.
"""

from dataclasses import dataclass
from typing import Any, Literal

from leangrid.errors import ArchitectureError

Groups = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Architecture:
    """Where a model family keeps its blocks.

    Attributes:
        blocks: path of the list of blocks, from the base model (the model without its head).
        groups: linears of a block by shared input, in the order of the forward pass; paths from the block.
        kind: "decoder" (causal, has perplexity) or "encoder".
        layer: "linear" (nn.Linear, weight [out, in]) or "conv1d" (GPT-2's transposed twin).
    """

    blocks: str
    groups: Groups
    kind: Literal["decoder", "encoder"] = "decoder"
    layer: Literal["linear", "conv1d"] = "linear"


_LLAMA: Groups = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
_PHI3: Groups = (("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",))
_OPT: Groups = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.out_proj",),
    ("fc1",),
    ("fc2",),
)
_GPT2: Groups = (("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",))
_BERT: Groups = (
    ("attention.self.query", "attention.self.key", "attention.self.value"),
    ("attention.output.dense",),
    ("intermediate.dense",),
    ("output.dense",),
)

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("layers", _LLAMA),
    "mistral": Architecture("layers", _LLAMA),
    "qwen2": Architecture("layers", _LLAMA),
    "qwen3": Architecture("layers", _LLAMA),
    "gemma2": Architecture("layers", _LLAMA),
    "gemma3_text": Architecture("layers", _LLAMA),
    "phi3": Architecture("layers", _PHI3),
    "opt": Architecture("decoder.layers", _OPT),
    "gpt2": Architecture("h", _GPT2, layer="conv1d"),
    "bert": Architecture("encoder.layer", _BERT, kind="encoder"),
}


def architecture_of(config: dict[str, Any]) -> Architecture:
    """The row for a checkpoint's ``config.json``; ArchitectureError names an unknown one and how to add it.

    A checkpoint that brings its own code (``auto_map``) is read as the plain model of its type; its code is never run.
    """
    name = config.get("model_type")
    row = ARCHITECTURES.get(name) if isinstance(name, str) else None
    if row is None:
        known = ", ".join(sorted(ARCHITECTURES))
        raise ArchitectureError(
            f"the architecture '{name}' is not known",
            "config.json: model_type",
            f"Known: {known}. To add one, add its row to leangrid/models/architectures.py (ARCHITECTURE.md shows how)",
        )
    return row

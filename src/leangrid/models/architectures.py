"""The architectures leangrid knows, one row each.

A row says where the blocks are and which linears of a block read the same input, in the order in which the block calls
them. The linears of a group share their Hessian and its factor; the inputs of a later group come from the quantized
earlier ones (GPTQ's "true-sequential"). To add an architecture, add its row here and a tiny model of it to
tests/support/tiny_models.py."""

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from leangrid.errors import ArchitectureError

Groups = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Architecture:
    """Where the linears of a model family are.

    Attributes:
        blocks: the path of the list of blocks in the base model, which is the model without its head.
        groups: the linears of a block by shared input, in the order of the forward pass; paths from the block.
        kind: "decoder" (causal, has a perplexity) or "encoder".
        layer: "linear" (nn.Linear, weight [out, in]) or "conv1d" (transformers' Conv1D, weight [in, out]).
        sparse: a mixture of experts. ``*`` in a name stands for every expert; names that a block lacks are left out,
            since blocks differ.
    """

    blocks: str
    groups: Groups
    kind: Literal["decoder", "encoder"] = "decoder"
    layer: Literal["linear", "conv1d"] = "linear"
    sparse: bool = False

    def transposed(self, weight: Tensor) -> Tensor:
        """A weight as [rows, cols] from how the module stores it, or back: GPT-2's Conv1D stores the transpose."""
        return weight.t() if self.layer == "conv1d" else weight

    def groups_of(self, block: nn.Module) -> Groups:
        """The groups of one block. All experts' linears of one stage (experts.py) are one group."""
        if not self.sparse:
            return self.groups
        there = {name for name, _ in block.named_modules()}
        found = []
        for names in self.groups:
            mixture = names[0].partition(".*.")[0]
            experts = range(
                sum(name.rpartition(".")[0] == mixture and name.rpartition(".")[2].isdigit() for name in there)
            )
            every = [name.replace("*", str(e)) for e in experts for name in names] if "*" in names[0] else names
            found.append(tuple(name for name in every if name in there))
        return tuple(names for names in found if names)


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
_ATTENTION = _LLAMA[:2]
_DENSE = _LLAMA[2:]  # of the blocks without experts
_EXPERTS: Groups = (("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj"), ("mlp.experts.*.down_proj",))
_MIXTRAL: Groups = (
    ("block_sparse_moe.experts.*.w1", "block_sparse_moe.experts.*.w3"),
    ("block_sparse_moe.experts.*.w2",),
)
_DEEPSEEK_ATTENTION: Groups = (
    ("self_attn.q_a_proj",),
    ("self_attn.q_b_proj",),
    ("self_attn.q_proj", "self_attn.kv_a_proj_with_mqa"),  # q_proj instead of the two where queries are not compressed
    ("self_attn.kv_b_proj",),
    ("self_attn.o_proj",),
)


def _shared(name: str) -> Groups:
    return (f"mlp.{name}.gate_proj", f"mlp.{name}.up_proj"), (f"mlp.{name}.down_proj",)


_DEEPSEEK = Architecture("layers", (*_DEEPSEEK_ATTENTION, *_DENSE, *_EXPERTS, *_shared("shared_experts")), sparse=True)

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("layers", _LLAMA),
    "mistral": Architecture("layers", _LLAMA),
    "qwen2": Architecture("layers", _LLAMA),
    "qwen3": Architecture("layers", _LLAMA),
    "gemma2": Architecture("layers", _LLAMA),
    "gemma3_text": Architecture("layers", _LLAMA),
    "mixtral": Architecture("layers", (*_ATTENTION, *_MIXTRAL), sparse=True),
    "qwen2_moe": Architecture("layers", (*_ATTENTION, *_DENSE, *_shared("shared_expert"), *_EXPERTS), sparse=True),
    "qwen3_moe": Architecture("layers", (*_ATTENTION, *_DENSE, *_EXPERTS), sparse=True),
    "olmoe": Architecture("layers", (*_ATTENTION, *_EXPERTS), sparse=True),
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "phi3": Architecture("layers", _PHI3),
    "opt": Architecture("decoder.layers", _OPT),
    "gpt2": Architecture("h", _GPT2, layer="conv1d"),
    "bert": Architecture("encoder.layer", _BERT, kind="encoder"),
}


def architecture_of(config: dict[str, Any]) -> Architecture:
    """The row of the architecture that a checkpoint's config.json names; ArchitectureError where there is none.

    A checkpoint with code of its own (``auto_map``) is read as transformers' model of its type; its code is never run.
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

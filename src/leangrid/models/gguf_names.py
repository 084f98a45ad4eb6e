"""A config.json in llama.cpp's terms: its name of the architecture, its header fields, its names of the tensors and the
order of their rows.

Sources: llama.cpp's loaders (src/models/*.cpp) and its converter. A missing field takes a default there, so every field
is written, and a setting for which llama.cpp has no field is refused."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import gguf
import torch
import transformers
from jaxtyping import Float, Int
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from leangrid.errors import ArchitectureError
from leangrid.storage.gguf import Field

_GEMMA3_PERIOD = 6  # in llama.cpp every sixth block attends to the whole context
_GEMMA3_27B = 62  # blocks of the one Gemma 3 whose attention is scaled by hidden_size / heads
ROPE_FREQS = "rope_freqs.weight"


@dataclass(frozen=True)
class _Family:
    """How llama.cpp computes an architecture: its name, its activation, and how tensors differ from transformers'."""

    arch: str
    activation: str
    permuted: bool = False  # rows of q and k are in the original Llama's order: rotated pairs beside each other
    norm_plus_one: bool = False  # llama.cpp stores a norm's weight, transformers the weight minus one


_FAMILIES: dict[str, _Family] = {
    "llama": _Family("llama", "silu", permuted=True),
    "mistral": _Family("llama", "silu", permuted=True),
    "qwen2": _Family("qwen2", "silu"),
    "qwen3": _Family("qwen3", "silu"),
    "gemma3_text": _Family("gemma3", "gelu_pytorch_tanh", norm_plus_one=True),
}


@dataclass(frozen=True, eq=False)
class GgufModel:
    """A model in llama.cpp's terms.

    Attributes:
        arch: its name of the architecture.
        fields: the header's fields without the tokenizer.
        extra: tensors by name that a checkpoint does not have, f32.
        notices: sentences for the user.
        norm_plus_one: whether 1 is added to the weights of norms.
    """

    arch: str
    fields: dict[str, Field]
    extra: dict[str, Float[Tensor, " n"]]
    notices: tuple[str, ...]
    norm_plus_one: bool
    _heads: dict[str, int]  # ".q_proj." -> heads, where rows are permuted
    _names: Callable[[str], str | None]

    def tensor_name(self, name: str) -> str:
        """llama.cpp's name of a checkpoint's tensor; ArchitectureError where it has none."""
        found = self._names(name)
        if found is None:
            raise ArchitectureError(
                f"llama.cpp's {self.arch} has no place for this tensor", name, "Export to dense instead"
            )
        return found

    def row_order(self, name: str, rows: int) -> Int[Tensor, " rows"] | None:
        """Which row of the checkpoint's tensor comes i-th in the file; None where the order is the same."""
        heads = next((count for part, count in self._heads.items() if part in name), None)
        if heads is None:
            return None
        return torch.arange(rows).reshape(heads, 2, -1).transpose(1, 2).reshape(-1)


def describe(config: dict[str, Any], name: str) -> GgufModel:
    """Translate a config.json into llama.cpp's terms; ``name`` becomes general.name.

    Raises:
        ArchitectureError: the architecture is not in the table, or llama.cpp has no field for a setting.
    """
    family = _FAMILIES.get(config.get("model_type", ""))
    if family is None:
        raise ArchitectureError(
            f"the GGUF export does not know '{config.get('model_type')}'",
            "config.json: model_type",
            f"It knows: {', '.join(_FAMILIES)}. Export to dense and use llama.cpp's own converter",
        )
    plain: Any = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(
        deepcopy({k: v for k, v in config.items() if k != "quantization_config"})  # transformers writes into it
    )
    head_dim = getattr(plain, "head_dim", None) or plain.hidden_size // plain.num_attention_heads
    _check(plain, family, head_dim)
    notices: list[str] = []
    extra, rope = _rope(plain, family)
    values = {
        "block_count": ("uint32", plain.num_hidden_layers),
        "context_length": ("uint32", _context(plain, notices)),
        "embedding_length": ("uint32", plain.hidden_size),
        "feed_forward_length": ("uint32", plain.intermediate_size),
        "attention.head_count": ("uint32", plain.num_attention_heads),
        "attention.head_count_kv": ("uint32", plain.num_key_value_heads),
        "attention.key_length": ("uint32", head_dim),
        "attention.value_length": ("uint32", head_dim),
        "attention.layer_norm_rms_epsilon": ("float32", plain.rms_norm_eps),
        "vocab_size": ("uint32", plain.vocab_size),
        "rope.dimension_count": ("uint32", head_dim),
        **rope,
    }
    fields = {"general.architecture": Field("string", family.arch), "general.type": Field("string", "model"),
              "general.name": Field("string", name),
              **{f"{family.arch}.{key}": Field(*value) for key, value in values.items()}}  # fmt: skip
    heads = {".q_proj.": plain.num_attention_heads, ".k_proj.": plain.num_key_value_heads} if family.permuted else {}
    number = next(number for number, text in gguf.MODEL_ARCH_NAMES.items() if text == family.arch)
    table = gguf.get_tensor_name_map(number, plain.num_hidden_layers)
    return GgufModel(family.arch, fields, extra, tuple(notices), family.norm_plus_one, heads,
                     lambda tensor: table.get_name(tensor, try_suffixes=(".weight", ".bias")))  # fmt: skip


def _context(config: Any, notices: list[str]) -> int:
    """The longest context in which llama.cpp computes the same as transformers. It does not know Mistral's sliding
    window, so the context is limited to the window."""
    window = getattr(config, "sliding_window", None)
    if config.model_type == "mistral" and window and window < config.max_position_embeddings:
        notices.append(
            "llama.cpp knows no sliding window for this architecture: "
            f"the context is limited to the window, {window} tokens"
        )
        return window
    return config.max_position_embeddings


def _check(config: Any, family: _Family, head_dim: int) -> None:
    """Raise ArchitectureError for a setting that llama.cpp computes differently and has no field for."""
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    wrong = None
    if activation != family.activation:
        wrong = f"hidden_act {activation!r} (llama.cpp computes {family.activation})"
    elif getattr(config, "use_sliding_window", False):
        wrong = "use_sliding_window"
    elif getattr(config, "attn_logit_softcapping", None) or getattr(config, "final_logit_softcapping", None):
        wrong = "logit softcapping"
    elif getattr(config, "use_bidirectional_attention", False):
        wrong = "use_bidirectional_attention"
    elif family.arch == "gemma3":
        kinds = [
            "full_attention" if i % _GEMMA3_PERIOD == _GEMMA3_PERIOD - 1 else "sliding_attention"
            for i in range(config.num_hidden_layers)
        ]
        wide = config.num_hidden_layers == _GEMMA3_27B
        scalar = config.hidden_size // config.num_attention_heads if wide else head_dim
        if list(config.layer_types) != kinds:
            wrong = f"layer_types other than one full attention in {_GEMMA3_PERIOD} blocks"
        elif config.query_pre_attn_scalar != scalar:
            wrong = f"query_pre_attn_scalar {config.query_pre_attn_scalar} (llama.cpp scales by {scalar})"
    if wrong is not None:
        raise ArchitectureError(
            f"llama.cpp's {family.arch} has no way to say {wrong}", "config.json", "Export to dense instead"
        )


def _rope(config: Any, family: _Family) -> tuple[dict[str, Tensor], dict[str, tuple[str, Any]]]:
    """The rotary parameters as tensors and as fields."""
    rope = config.rope_parameters
    fields: dict[str, tuple[str, Any]] = {}
    if family.arch == "gemma3":
        local, rope = rope["sliding_attention"], rope["full_attention"]
        if local.get("rope_type", "default") != "default":
            raise _unknown_rope(local["rope_type"])
        fields["rope.freq_base_swa"] = ("float32", local["rope_theta"])
        fields["attention.sliding_window"] = ("uint32", config.sliding_window)
    fields["rope.freq_base"] = ("float32", rope["rope_theta"])
    kind = rope.get("rope_type", "default")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise _unknown_rope("partial")
    if kind == "linear":
        fields |= {"rope.scaling.type": ("string", "linear"), "rope.scaling.factor": ("float32", rope["factor"])}
    elif kind == "llama3" and family.arch == "llama":
        return {ROPE_FREQS: _llama3_factors(config)}, fields
    elif kind != "default":
        raise _unknown_rope(kind)
    return {}, fields


def _llama3_factors(config: Any) -> Float[Tensor, " half_head_dim"]:
    """The factor by which llama.cpp divides each frequency: transformers' unscaled frequencies over its scaled ones."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    return (1.0 / config.rope_parameters["rope_theta"] ** exponents) / scaled


def _unknown_rope(kind: str) -> ArchitectureError:
    return ArchitectureError(
        f"the GGUF export does not write rope scaling of type '{kind}'",
        "config.json: rope_parameters",
        "It writes default, linear and, for Llama, llama3. Export to dense and use llama.cpp's converter",
    )

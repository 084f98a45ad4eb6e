"""Checkpoints that are described instead of stored, for ``plan``: well-known models by name, any model by its
config.json, or by the header of another file.

SHAPES has the fields of each model's config.json that decide shapes, as its publisher gives them on the hub. To add a
model, add its row."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from leangrid.errors import CheckpointError
from leangrid.models.model_class import empty_model
from leangrid.storage.config import read_config
from leangrid.storage.dtypes import COMPUTED, DTYPES, NAMES, torch_name

_DTYPES = {torch_name(DTYPES[name]): DTYPES[name] for name in COMPUTED}  # as config.json spells them


def _row(
    kind: str, hidden: int, inner: int, layers: int, heads: int, kv: int, vocabulary: int, **more: Any
) -> dict[str, Any]:
    names = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma2": "Gemma2"}
    return {
        "model_type": kind,
        "architectures": [f"{names[kind]}ForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocabulary,
        # Enough for any calibration window; only the rotary tables depend on it.
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    } | more


SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": _row("llama", 4096, 11008, 32, 32, 32, 32000),
    "llama-2-13b": _row("llama", 5120, 13824, 40, 40, 40, 32000),
    "llama-2-70b": _row("llama", 8192, 28672, 80, 64, 8, 32000),
    "llama-3-8b": _row("llama", 4096, 14336, 32, 32, 8, 128256),
    "llama-3-70b": _row("llama", 8192, 28672, 80, 64, 8, 128256),
    "llama-3.1-405b": _row("llama", 16384, 53248, 126, 128, 8, 128256),
    "mistral-7b": _row("mistral", 4096, 14336, 32, 32, 8, 32000),
    "mistral-large-123b": _row("mistral", 12288, 28672, 88, 96, 8, 32768, head_dim=128),
    "qwen2.5-0.5b": _row("qwen2", 896, 4864, 24, 14, 2, 151936, tie_word_embeddings=True),
    "qwen2.5-7b": _row("qwen2", 3584, 18944, 28, 28, 4, 152064),
    "qwen2.5-72b": _row("qwen2", 8192, 29568, 80, 64, 8, 152064),
    "qwen3-8b": _row("qwen3", 4096, 12288, 36, 32, 8, 151936, head_dim=128),
    "gemma-2-9b": _row("gemma2", 3584, 14336, 42, 16, 8, 256000, head_dim=256, tie_word_embeddings=True),
    "smollm2-135m": _row("llama", 576, 1536, 30, 9, 3, 49152, tie_word_embeddings=True),
}


@dataclass(frozen=True)
class TensorShape:
    """A tensor without its values: its dtype as safetensors names it, its shape, its size in bytes."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class DescribedCheckpoint:
    """The config and the shapes of a checkpoint, without weights.

    Attributes:
        directory: what it is called in errors; nothing has to lie there.
        config: config.json.
        tensors: its tensors by name.
        notices: sentences for the user.
    """

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, TensorShape]
    notices: tuple[str, ...] = ()

    @classmethod
    def of(cls, where: Path, config: dict[str, Any], model: nn.Module, dtype: torch.dtype) -> "DescribedCheckpoint":
        """The description of ``model``, which is on the meta device, in ``dtype``, tied tensors once."""
        name, size = NAMES[dtype], dtype.itemsize
        tied = set(getattr(model, "all_tied_weights_keys", None) or {})
        tensors = {
            n: TensorShape(name, tuple(t.shape), t.numel() * size)
            for n, t in model.state_dict().items()
            if n not in tied
        }
        return cls(where, config, tensors)

    def read(self, name: str) -> Tensor:
        """Raise CheckpointError: a description has no weights."""
        raise CheckpointError("a described checkpoint holds no weights", name, "Give the checkpoint itself")

    def tensors_equal(self, one: str, other: str) -> bool:
        """True: nothing tells two tensors of a description apart."""
        return True


def describe_shape(text: str) -> DescribedCheckpoint:
    """Describe the model that ``text`` names: a row of SHAPES, or the path of a config.json or of its directory.

    Raises:
        CheckpointError: it is neither, or no model can be built from the config.
        ArchitectureError: its architecture is not known.
    """
    row = SHAPES.get(text.lower())
    path = Path(text).expanduser()
    if row is None and not path.exists():
        raise CheckpointError(
            f"'{text}' is no known shape and no file", "--shape", f"Known: {', '.join(SHAPES)}; or give a config.json"
        )
    if row is not None:
        where, config = Path(text.lower()), dict(row)
    else:
        where = path / "config.json" if path.is_dir() else path
        config = read_config(where)
    stored = config.get("torch_dtype", config.get("dtype", "float32"))
    if stored not in _DTYPES:
        raise CheckpointError(f"weights of dtype '{stored}' cannot be quantized", where, f"Known: {', '.join(_DTYPES)}")
    described = DescribedCheckpoint(where, config, {})
    return replace(
        described, tensors=DescribedCheckpoint.of(where, config, empty_model(described), _DTYPES[stored]).tensors
    )

"""The header fields of one architecture, taken one by one: what nobody took in the end changes the model and was not
understood."""

import math
from functools import cache
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from leangrid.errors import CheckpointError
from leangrid.storage.gguf_header import Header, StoredTensor

_WAY_OUT = "Give the model's own checkpoint (safetensors and config.json) as SOURCE"
_PLAIN: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "F64": np.float64}
_CHUNK = 1 << 22  # weights that become numbers at once

# Fields that change nothing at these values (a missing field of llama.cpp's is one of them); they are refused at
# others.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.output_scale": (0, 1),
    "attention.scale": (0,),
    "attention.shared_kv_layers": (0,),
    "attention.sliding_window": (0,),
    "attention.temperature_length": (0,),
    "attention.temperature_scale": (0,),
    "attn_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "expert_count": (0,),
    "expert_gating_func": (0, 1),  # softmax
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_shared_count": (0,),
    "expert_shared_feed_forward_length": (0,),
    "expert_used_count": (0,),
    "expert_weights_scale": (0, 1),
    "final_logit_softcapping": (0,),
    "leading_dense_block_count": (0,),
    "logit_scale": (0, 1),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
    "residual_scale": (0, 1),
    "router_logit_softcapping": (0,),
}
# Fields that no forward pass reads.
_SAID_ONLY = ("vocab_size", "tensor_data_layout", "attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon",
              "rope.scaling.original_context_length")  # fmt: skip


class Fields:
    """The fields ``ARCH.*`` of a header, and its tensors; every read is remembered."""

    def __init__(self, header: Header, arch: str) -> None:
        self.header, self.arch = header, arch
        self.taken: set[str] = set()
        self.vectors: set[str] = set()  # tensors that became part of the config

    def take(self, key: str, default: Any = None) -> Any:
        """The value of ``ARCH.key``, as it is stored; ``default`` where the file says nothing."""
        self.taken.add(key)
        return self.header.value(f"{self.arch}.{key}", default)

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number, as the shortest decimal that float32 reads as the stored one; CheckpointError where it is
        required or none."""
        value = self._one(key, self.take(key, default))
        if isinstance(value, str) or not math.isfinite(value):
            raise self.refuse(key, repr(value))
        return float(str(np.float32(value))) if isinstance(value, float) and abs(value) < 1e38 else float(value)

    def integer(self, key: str, default: int | None = None) -> int:
        """A number from 0 to 2^31; one value of a list where all are the same."""
        value = self._one(key, self.take(key, default))
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
            raise self.refuse(key, repr(value))
        return value

    def text(self, key: str, default: str) -> str:
        """A string."""
        value = self.take(key, default)
        if not isinstance(value, str):
            raise self.refuse(key, repr(value))
        return value

    def _one(self, key: str, value: Any) -> Any:
        if value is None:
            raise CheckpointError(f"the field {self.arch}.{key} is missing", self.header.file, _WAY_OUT)
        if isinstance(value, list):
            if not value or any(item != value[0] for item in value):
                raise self.refuse(key, "one value a block")
            return value[0]
        return value

    def has_tensor(self, *names: str) -> bool:
        """Whether the file holds one of these tensors."""
        return any(name in self.header.tensors for name in names)

    def vector(self, name: str, length: int) -> list[float] | None:
        """The values of a small tensor; None where the file has none of this name. Its name counts as understood."""
        stored = self.header.tensors.get(name)
        if stored is None:
            return None
        self.vectors.add(name)
        if stored.shape != (length,):
            raise self.refuse(name, f"{list(stored.shape)} factors, where the heads have {length}")
        return [float(str(np.float32(value))) for value in rows(stored, 0, 1).reshape(-1).tolist()]

    def check_rest(self) -> None:
        """CheckpointError for the first field that was not taken and is not known to change nothing."""
        for key, field in self.header.fields.items():
            name = key.removeprefix(f"{self.arch}.")
            if name == key or name in self.taken or name in _SAID_ONLY:
                continue
            values = field.value if isinstance(field.value, list) else [field.value]
            if not all(value in _NEUTRAL.get(name, ()) for value in values):
                raise self.refuse(name, str(field.value)[:60])

    def refuse(self, key: str, value: str) -> CheckpointError:
        """The refusal of a field or tensor whose meaning transformers' class cannot be told."""
        name = key if key.endswith(".weight") else f"{self.arch}.{key}"
        return CheckpointError(
            f"the GGUF file says {name} = {value}, which leangrid cannot carry over", self.header.file, _WAY_OUT
        )


@cache
def readable(kind: str) -> bool:
    """Whether weights of ggml's type ``kind`` can be made numbers: plain floats, and the blocks that gguf-py has
    formulas for."""
    number = gguf.GGMLQuantizationType[kind]
    if kind in _PLAIN:
        return True
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[number][1]), np.uint8), number)
    except NotImplementedError:
        return False
    return True


def rows(stored: StoredTensor, first: int, count: int) -> Tensor:
    """``count`` rows of a tensor from row ``first`` on, as float32 [count, columns] (float64 where they are stored
    so)."""
    with stored.file.open("rb", buffering=0) as file:
        file.seek(stored.start + first * stored.row_bytes)
        raw = np.empty((count, stored.row_bytes), np.uint8)
        if file.readinto(raw.data) != raw.nbytes:  # pyright: ignore[reportArgumentType]
            raise CheckpointError(
                "the file ends early: it has become shorter", stored.file, "Check the download and the disk"
            )
    if stored.kind in _PLAIN:
        values = raw.view(_PLAIN[stored.kind])
        return torch.from_numpy(values if stored.kind == "F64" else values.astype(np.float32))
    with np.errstate(all="ignore"):  # a scale that is no number: whoever reads the weights says so
        return torch.from_numpy(gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[stored.kind]))


def chunk(stored: StoredTensor) -> int:
    """How many rows are made numbers at once."""
    return max(1, _CHUNK // stored.shape[-1])

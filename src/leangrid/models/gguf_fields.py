"""The header fields of a GGUF model, read one by one. A field that was not read and is not known to be neutral would
change the model, so it is refused."""

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
_CHUNK = 1 << 22  # weights that are dequantized at once

# Fields that change nothing at these values, one of which llama.cpp takes where the field is missing; other values are
# refused.
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
# Fields that no forward pass of llama.cpp reads.
_UNUSED = ("vocab_size", "tensor_data_layout", "attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon",
              "rope.scaling.original_context_length")  # fmt: skip


class Fields:
    """The fields ``ARCH.*`` of a header and its tensors, with a record of which were read.

    Attributes:
        header: the file's header. arch: llama.cpp's name of the architecture, ARCH.
        keys_read: the fields that were read. vectors: names of tensors that were read into the config.
    """

    def __init__(self, header: Header, arch: str) -> None:
        self.header, self.arch = header, arch
        self.keys_read: set[str] = set()
        self.vectors: set[str] = set()

    def value(self, key: str, default: Any = None) -> Any:
        """The value of the field ``ARCH.key`` as stored; ``default`` where it is missing."""
        self.keys_read.add(key)
        return self.header.value(f"{self.arch}.{key}", default)

    def number(self, key: str, default: float | None = None) -> float:
        """The field as a finite number: the shortest decimal that float32 rounds to the stored value. CheckpointError
        where it is no number, or is missing and ``default`` is None."""
        value = self._one(key, self.value(key, default))
        if isinstance(value, str) or not math.isfinite(value):
            raise self.refusal(key, repr(value))
        return float(str(np.float32(value))) if isinstance(value, float) and abs(value) < 1e38 else float(value)

    def integer(self, key: str, default: int | None = None) -> int:
        """The field as an integer from 0 to 2^31 - 1; for a list of equal values, that value. CheckpointError where it
        is something else, or is missing and ``default`` is None."""
        value = self._one(key, self.value(key, default))
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
            raise self.refusal(key, repr(value))
        return value

    def text(self, key: str, default: str) -> str:
        """The field as a string; CheckpointError where it is none."""
        value = self.value(key, default)
        if not isinstance(value, str):
            raise self.refusal(key, repr(value))
        return value

    def _one(self, key: str, value: Any) -> Any:
        if value is None:
            raise CheckpointError(f"the field {self.arch}.{key} is missing", self.header.file, _WAY_OUT)
        if isinstance(value, list):
            if not value or any(item != value[0] for item in value):
                raise self.refusal(key, "one value a block")
            return value[0]
        return value

    def has_tensor(self, *names: str) -> bool:
        """Whether the file has one of these tensors."""
        return any(name in self.header.tensors for name in names)

    def vector(self, name: str, length: int) -> list[float] | None:
        """The values of a tensor [length], which then counts as read; None where the file does not have it."""
        stored = self.header.tensors.get(name)
        if stored is None:
            return None
        self.vectors.add(name)
        if stored.shape != (length,):
            raise self.refusal(name, f"{list(stored.shape)} factors, where the heads have {length}")
        return [float(str(np.float32(value))) for value in read_rows(stored, 0, 1).reshape(-1).tolist()]

    def refuse_unread(self) -> None:
        """Raise CheckpointError for the first field that was not read and is not known to change nothing."""
        for key, field in self.header.fields.items():
            name = key.removeprefix(f"{self.arch}.")
            if name == key or name in self.keys_read or name in _UNUSED:
                continue
            values = field.value if isinstance(field.value, list) else [field.value]
            if not all(value in _NEUTRAL.get(name, ()) for value in values):
                raise self.refusal(name, str(field.value)[:60])

    def refusal(self, key: str, value: str) -> CheckpointError:
        """The CheckpointError for a field or tensor that transformers' class has no setting for."""
        name = key if key.endswith(".weight") else f"{self.arch}.{key}"
        return CheckpointError(
            f"the GGUF file says {name} = {value}, which leangrid cannot carry over", self.header.file, _WAY_OUT
        )


@cache
def can_dequantize(kind: str) -> bool:
    """Whether weights of ggml's type ``kind`` can be read: floats, and the blocks that gguf-py dequantizes."""
    number = gguf.GGMLQuantizationType[kind]
    if kind in _PLAIN:
        return True
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[number][1]), np.uint8), number)
    except NotImplementedError:
        return False
    return True


def read_rows(stored: StoredTensor, first: int, count: int) -> Tensor:
    """Read and dequantize ``count`` rows of a tensor from row ``first`` on: float32 [count, columns], float64 for F64.
    CheckpointError where the file ends early."""
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
    with np.errstate(all="ignore"):  # a NaN or infinite weight is refused where the weights are used
        return torch.from_numpy(gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[stored.kind]))


def rows_at_once(stored: StoredTensor) -> int:
    """How many rows of a tensor are dequantized at once."""
    return max(1, _CHUNK // stored.shape[-1])

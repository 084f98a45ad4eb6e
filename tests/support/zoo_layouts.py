"""Quantized weights of four bits, unpacked from the containers of other engines by code that is not leangrid's: gptq
and awq by hand, mlx and llama.cpp's blocks by those engines' own packages."""

from collections.abc import Callable

import gguf
import mlx.core as mx
import numpy as np
import torch
import zoo_files
from torch import Tensor

Parts = dict[str, Tensor]
_AWQ_ROWS = (0, 4, 1, 5, 2, 6, 3, 7)  # nibble that holds row i of eight
_NIBBLES = np.arange(0, 32, 4, dtype=np.uint32)


def unpack(tensors: Parts, config: dict, dtype: torch.dtype = torch.float32) -> tuple[Parts, Parts]:
    """The quantized weights of a result in any container by ``<linear>.weight``, [rows, cols], rounded to ``dtype`` as
    its reader does, and its other tensors; all in float32."""
    dense, rest = _unpack(tensors, config)
    dense = {name: weight.to(dtype) for name, weight in dense.items()}
    return widened(dense), widened(rest)


def widened(tensors: Parts) -> Parts:
    """The same tensors, numbers in float32."""
    return {name: one.float() if one.is_floating_point() else one for name, one in tensors.items()}


def _unpack(tensors: Parts, config: dict) -> tuple[Parts, Parts]:
    entry = config.get("quantization_config") or {}
    found = _WAYS.get(str(entry.get("quant_method", "mlx" if "group_size" in entry else "")))
    if entry.get("format") == "gguf":
        found = (("weight",), _blocks)
    if found is None:
        return zoo_files.unpacked(tensors, config)
    suffixes, dense_of = found
    rest, dense = dict(tensors), {}
    for name in sorted(tensors):
        owner, _, leaf = name.rpartition(".")
        if leaf == suffixes[0] and not tensors[name].dtype.is_floating_point and tensors[name].ndim == 2:
            parts = {suffix: rest.pop(f"{owner}.{suffix}") for suffix in suffixes}
            dense[f"{owner}.weight"] = dense_of(parts, entry)
    return dense, rest


def _gptq(parts: Parts, entry: dict) -> Tensor:
    """S (q - Z), all stored transposed; version 1 stores Z - 1."""
    codes = _nibbles(parts["qweight"].T.contiguous()).T  # [cols, rows]
    zeros = _nibbles(parts["qzeros"]) + (1 if entry["checkpoint_format"] == "gptq" else 0)
    groups = parts["g_idx"].long()
    return (parts["scales"].float()[groups] * (codes - zeros[groups])).T.contiguous()


def _awq(parts: Parts, entry: dict) -> Tensor:
    """S (q - Z), eight neighbouring rows a word."""
    size = entry["group_size"]
    codes, zeros = (_nibbles(parts[name]).unflatten(1, (-1, 8))[..., list(_AWQ_ROWS)].flatten(1)
                    for name in ("qweight", "qzeros"))  # fmt: skip
    scales, zeros = (x.float().repeat_interleave(size, 0) for x in (parts["scales"], zeros))
    return (scales * (codes - zeros)).T.contiguous()


def _mlx(parts: Parts, entry: dict) -> Tensor:
    """s q + b by mlx itself, in float32."""
    numbers = (mx.array(parts[name].float().numpy()) for name in ("scales", "biases"))
    words = mx.array(parts["weight"].numpy())
    out = mx.dequantize(words, *numbers, group_size=entry["group_size"], bits=entry["bits"])
    return torch.from_numpy(np.array(out))


def _blocks(parts: Parts, entry: dict) -> Tensor:
    """llama.cpp's blocks by gguf-py."""
    kind = gguf.GGMLQuantizationType[entry["type"]]
    return torch.from_numpy(gguf.dequantize(parts["weight"].numpy(), kind).astype(np.float32))


def _nibbles(words: Tensor) -> Tensor:
    """Eight codes a word along the last axis, the first in the lowest bits; float32."""
    numbers = words.contiguous().numpy().view(np.uint32)
    codes = (numbers[..., None] >> _NIBBLES) & np.uint32(15)
    return torch.from_numpy(codes.reshape(len(words), -1).astype(np.float32))


_WAYS: dict[str, tuple[tuple[str, ...], Callable[[Parts, dict], Tensor]]] = {
    "gptq": (("qweight", "qzeros", "scales", "g_idx"), _gptq),
    "awq": (("qweight", "qzeros", "scales"), _awq),
    "mlx": (("weight", "scales", "biases"), _mlx),
}

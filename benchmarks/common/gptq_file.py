"""Converts a checkpoint of GPTQModel to one with dense weights, so that one evaluator measures all results.

A linear of [rows, cols] with codes of b bits is stored as qweight int32 [cols b / 32, rows] (the codes of a row one
after another, least significant bit first, down its column of words), qzeros int32 [groups, rows b / 32], scales
float16 [groups, rows] and g_idx int32 [cols], the group of each column: W[r, c] = scales[g, r] * (code[r, c] -
zero[g, r]), g = g_idx[c]. Files of format "gptq" hold zero - 1 (mod 2^b), files of "gptq_v2" the zero itself. Source of
the layout: the files themselves, and GPTQModel's own kernel, whose answer race.py compares with that of the checkpoint
written here.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leangrid.formats.bit_stream import unpack
from leangrid.storage import safetensors

_BITS = (2, 3, 4, 8)
_ZERO_OFFSET = {"gptq": 1, "gptq_v2": 0}
_PARTS = ("qweight", "qzeros", "scales", "g_idx")


def weight(qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor, bits: int, zero_offset: int) -> Tensor:
    """The dense weight of one linear, float32 [rows, cols]."""
    rows, cols = scales.shape[1], g_idx.numel()
    codes = unpack(qweight.T.contiguous(), bits, cols).float()
    zeros = (unpack(qzeros.contiguous(), bits, rows).int() + zero_offset) & (2**bits - 1)
    group = g_idx.long()
    return scales.float().T[:, group] * (codes - zeros.float().T[:, group])


def dequantize(directory: Path, out: Path) -> None:
    """Write the model in ``directory`` to ``out`` as a float32 checkpoint. SystemExit where its layout is not the one
    described above."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    stated = config.pop("quantization_config")
    bits, form = stated.get("bits"), stated.get("checkpoint_format")
    if bits not in _BITS or form not in _ZERO_OFFSET:
        raise SystemExit(
            f"{directory}: {bits} bits in format {form!r}; only {', '.join(map(str, _BITS))} bits in "
            f"{', '.join(_ZERO_OFFSET)} are read"
        )
    stored: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        stored |= safetensors.load(file)
    tensors = plain(stored, bits, _ZERO_OFFSET[form])
    out.mkdir(parents=True)
    safetensors.save(out / "model.safetensors", tensors, {"format": "pt"})
    (out / "config.json").write_text(json.dumps(config | {"dtype": "float32"}), encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (directory / name).is_file():
            shutil.copyfile(directory / name, out / name)


def plain(stored: dict[str, Any], bits: int, zero_offset: int) -> dict[str, Tensor]:
    """The tensors of a file in float32 under the names of a plain checkpoint, its quantized linears dequantized."""
    layers = [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]
    parts = {f"{layer}.{part}" for layer in layers for part in _PARTS}
    tensors = {name: tensor.float() for name, tensor in stored.items() if name not in parts}
    for layer in layers:
        parts_of_layer = (stored[f"{layer}.{part}"] for part in _PARTS)
        tensors[f"{layer}.weight"] = weight(*parts_of_layer, bits, zero_offset).contiguous()
    return tensors


def agreement(ours: Tensor, theirs: Tensor) -> float:
    """The mean KL(theirs || ours) of two answers, logits [tokens, vocabulary]. It is near 0 where a file was read as
    its maker reads it."""
    first, second = (torch.log_softmax(logits.double(), dim=-1) for logits in (theirs, ours))
    return float((first.exp() * (first - second)).sum(-1).mean())

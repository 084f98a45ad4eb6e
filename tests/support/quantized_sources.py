"""Weights in fewer bits than 16 as other quantizers store them: random codes and scales in every layout, and their
values in float64, computed from the bits by the definition of each format.

``write`` puts them into a small checkpoint, ``store_linears`` stores the linears of a real one so."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FP8 = torch.float8_e4m3fn
WORD = 32


@dataclass
class Stored:
    """One weight: its tensors by the ends of their names, and its values, float64 [rows, cols]."""

    tensors: dict[str, Tensor]
    values: Tensor
    rounded: torch.dtype = torch.float32  # what products are rounded to before anything else


@dataclass
class Kind:
    """A layout: what config.json says, and how a weight [rows, cols] looks in it."""

    entry: dict[str, Any]
    make: Callable[[int, int, torch.Generator], Stored]
    described: str
    shape: tuple[int, int] = field(default=(96, 64))


def e4m3(byte: int) -> float:
    """The value of an FP8 byte (OFP8 E4M3): sign, 4 bits of exponent with bias 7, 3 of mantissa; 0x7f is NaN."""
    sign, exponent, mantissa = (-1) ** (byte >> 7), byte >> 3 & 15, byte & 7
    if byte & 0x7F == 0x7F:
        return math.nan
    return sign * (mantissa / 8 * 2**-6 if exponent == 0 else (1 + mantissa / 8) * 2 ** (exponent - 7))


def e2m1(nibble: int) -> float:
    """The value of an FP4 half byte (OCP MX, E2M1): sign, 2 bits of exponent with bias 1, 1 of mantissa."""
    sign, exponent, mantissa = (-1) ** (nibble >> 3), nibble >> 1 & 3, nibble & 1
    return sign * (mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2 ** (exponent - 1))


def bytes_of(count: int, cols: int, generator: torch.Generator) -> Tensor:
    """Random FP8 bytes without NaN."""
    found = torch.randint(256, (count, cols), generator=generator, dtype=torch.uint8)
    return torch.where(found & 0x7F == 0x7F, found & 0x80, found)


def values_of(codes: Tensor, value: Callable[[int], float]) -> Tensor:
    """float64 values of a matrix of small integers."""
    return torch.tensor([[value(int(code)) for code in row] for row in codes], dtype=torch.float64)


def spread(scale: Tensor, rows: int, cols: int, high: int, wide: int) -> Tensor:
    """One scale [blocks of rows, blocks of cols] for each value [rows, cols], the last blocks cut."""
    return scale.double().repeat_interleave(high, 0)[:rows].repeat_interleave(wide, 1)[:, :cols]


def random_scale(rows: int, cols: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.rand(rows, cols, generator=generator) * 0.02 + 1e-3).to(dtype)


def pack(codes: Tensor, bits: int, holes: bool = False) -> Tensor:
    """compressed-tensors' int32 words of unsigned codes [rows, cols], bit by bit; with ``holes`` as its version 0.17
    did: whole codes alone in each word."""
    words, each = [], WORD // bits
    for row in codes.tolist():
        places = [place // each * WORD + place % each * bits if holes else place * bits for place in range(len(row))]
        number = sum(code << place for place, code in zip(places, row, strict=True))
        count = -(-len(row) // each) if holes else -(-len(row) * bits // WORD)
        unsigned = [number >> WORD * place & 0xFFFFFFFF for place in range(count)]
        words.append([word - (1 << WORD) if word >> 31 else word for word in unsigned])
    return torch.tensor(words, dtype=torch.int32)


def _fp8(high: int | None, wide: int | None, end: str, scale_dtype: torch.dtype = torch.float32) -> Callable:
    def make(rows: int, cols: int, generator: torch.Generator) -> Stored:
        tall, broad = high or rows, wide or cols
        codes = bytes_of(rows, cols, generator)
        scale = random_scale(-(-rows // tall), -(-cols // broad), generator, scale_dtype)
        values = values_of(codes, e4m3) * spread(scale, rows, cols, tall, broad)
        rounded = scale_dtype if end == "weight_scale" else torch.float32
        return Stored({"weight": codes.view(FP8), end: scale}, values, rounded)

    return make


def _mxfp8(rows: int, cols: int, generator: torch.Generator) -> Stored:
    codes, exponent = bytes_of(rows, cols, generator), torch.randint(110, 125, (rows, cols // 32), generator=generator)
    values = values_of(codes, e4m3) * spread(2.0 ** (exponent.double() - 127), rows, cols, 1, 32)
    tensors = {"weight": codes.view(FP8), "weight_scale": exponent.to(torch.uint8)}
    return Stored(tensors, values, torch.bfloat16)


def _integers(
    bits: int, size: int | None, symmetric: bool, packed: bool, dtype: torch.dtype, holes: bool = False
) -> Callable:
    def make(rows: int, cols: int, generator: torch.Generator) -> Stored:
        half, wide = 1 << (bits - 1), size or cols
        codes = torch.randint(1 << bits, (rows, cols), generator=generator)
        zero = torch.randint(1 << bits, (rows, cols // wide), generator=generator)
        zero = torch.full_like(zero, half) if symmetric else zero
        scale = random_scale(rows, cols // wide, generator, dtype)
        values = (codes - spread(zero, rows, cols, 1, wide)) * spread(scale, rows, cols, 1, wide)
        if packed:
            tensors = {"weight_packed": pack(codes, bits, holes), "weight_shape": torch.tensor([rows, cols])}
        else:
            tensors = {"weight": (codes - half).to(torch.int8)}
        if not symmetric:
            unpacked = (zero - half).to(torch.int8)
            tensors["weight_zero_point"] = pack(zero.T, bits, holes).T.contiguous() if packed else unpacked
        return Stored(tensors | {"weight_scale": scale}, values, dtype)

    return make


def _halves(codes: Tensor) -> Tensor:
    """Two codes of four bits in a byte, the first in the lower half."""
    return (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8)


def _mxfp4(rows: int, cols: int, generator: torch.Generator) -> Stored:
    codes = torch.randint(16, (rows, cols), generator=generator)
    exponent = torch.randint(110, 125, (rows, cols // 32), generator=generator)
    values = values_of(codes, e2m1) * spread(2.0 ** (exponent.double() - 127), rows, cols, 1, 32)
    return Stored({"weight_packed": _halves(codes), "weight_scale": exponent.to(torch.uint8)}, values, torch.bfloat16)


def _nvfp4(ours: bool) -> Callable:
    """NVFP4 by compressed-tensors, whose second scale divides, or by ModelOpt, whose second scale multiplies."""

    def make(rows: int, cols: int, generator: torch.Generator) -> Stored:
        codes, scales = torch.randint(16, (rows, cols), generator=generator), bytes_of(rows, cols // 16, generator)
        scales &= 0x7F
        second = torch.rand(1, generator=generator) + 0.5
        each = values_of(scales, e4m3).float()
        each = each / second if ours else each * second  # in float32, as both compute it
        values = values_of(codes, e2m1) * spread(each, rows, cols, 1, 16)
        tensors = {"weight_packed" if ours else "weight": _halves(codes), "weight_scale": scales.view(FP8)}
        tensors["weight_global_scale" if ours else "weight_scale_2"] = second if ours else second[0]
        return Stored(tensors, values, torch.bfloat16 if ours else torch.float32)

    return make


def _ct(form: str, **weights: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"symmetric": True, **weights}}},
        "ignore": ["lm_head"],
    }


def _modelopt(algorithm: str) -> dict[str, Any]:
    return {"quant_method": "modelopt", "quant_algo": algorithm, "producer": {"name": "modelopt"}}


_BF16, _F32, _F16 = torch.bfloat16, torch.float32, torch.float16
_BLOCKS = {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"}
KINDS: dict[str, Kind] = {
    "fp8-blocks": Kind(_BLOCKS, _fp8(32, 32, "weight_scale_inv"), "FP8 with 32 x 32 scales"),
    "fp8-ragged": Kind(_BLOCKS, _fp8(32, 32, "weight_scale_inv"), "FP8 with 32 x 32 scales", (80, 56)),
    "fp8-exponents": Kind(
        {**_BLOCKS, "weight_block_size": [1, 32]},
        lambda r, c, g: Stored(
            (made := _mxfp8(r, c, g)).tensors | {"weight_scale_inv": made.tensors.pop("weight_scale")}, made.values
        ),
        "MXFP8",
    ),
    "fp8-tensor": Kind(
        {"quant_method": "fp8", "weight_block_size": None},
        _fp8(None, None, "weight_scale_inv"),
        "FP8 with one scale for each tensor",
    ),
    "fbgemm": Kind({"quant_method": "fbgemm_fp8"}, _fp8(1, None, "weight_scale"), "FP8 with a scale for each row"),
    "ct-fp8-row": Kind(
        _ct("float-quantized", num_bits=8, type="float", strategy="channel"),
        _fp8(1, None, "weight_scale", _BF16),
        "FP8 with a scale for each row",
    ),
    "ct-fp8-tensor": Kind(
        _ct("float-quantized", num_bits=8, type="float", strategy="tensor"),
        _fp8(None, None, "weight_scale", _F32),
        "FP8 with one scale for each tensor",
    ),
    "ct-fp8-blocks": Kind(
        _ct("float-quantized", num_bits=8, type="float", strategy="block", block_structure=[32, 32]),
        _fp8(32, 32, "weight_scale", _BF16),
        "FP8 with 32 x 32 scales",
        (80, 56),
    ),
    "ct-mxfp8": Kind(
        _ct("mxfp8-quantized", num_bits=8, type="float", strategy="group", group_size=32), _mxfp8, "MXFP8"
    ),
    "ct-int8": Kind(
        _ct("int-quantized", num_bits=8, type="int", strategy="channel"),
        _integers(8, None, True, False, _BF16),
        "INT8 with a scale for each row",
    ),
    "ct-int8-asymmetric": Kind(
        _ct("int-quantized", num_bits=8, type="int", strategy="channel", symmetric=False),
        _integers(8, None, False, False, _F16),
        "INT8 with a scale for each row",
    ),
    "ct-int4": Kind(  # Kimi-K2-Thinking
        _ct("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32),
        _integers(4, 32, True, True, _BF16),
        "INT4 in groups of 32",
    ),
    "ct-int4-asymmetric": Kind(
        _ct("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32, symmetric=False),
        _integers(4, 32, False, True, _BF16),
        "INT4 in groups of 32",
    ),
    "ct-int4-row": Kind(
        _ct("pack-quantized", num_bits=4, type="int", strategy="channel"),
        _integers(4, None, True, True, _F32),
        "INT4 with a scale for each row",
        (24, 61),
    ),
    "ct-int8-packed": Kind(
        _ct("pack-quantized", num_bits=8, type="int", strategy="group", group_size=16),
        _integers(8, 16, True, True, _BF16),
        "INT8 in groups of 16",
    ),
    "ct-int3": Kind(
        _ct("pack-quantized", num_bits=3, type="int", strategy="group", group_size=16, symmetric=False),
        _integers(3, 16, False, True, _F32),
        "INT3 in groups of 16",
        (50, 48),
    ),
    "ct-int3-holes": Kind(  # compressed-tensors 0.17 and older, such as AutoRound 0.16 writes with it
        _ct("pack-quantized", num_bits=3, type="int", strategy="group", group_size=16, symmetric=False),
        _integers(3, 16, False, True, _F32, holes=True),
        "INT3 in groups of 16",
        (50, 192),
    ),
    "ct-int5-holes": Kind(
        _ct("pack-quantized", num_bits=5, type="int", strategy="channel"),
        _integers(5, None, True, True, _BF16, holes=True),
        "INT5 with a scale for each row",
        (24, 61),
    ),
    "ct-nvfp4": Kind(
        _ct("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16),
        _nvfp4(True),
        "NVFP4",
    ),
    "ct-mxfp4": Kind(
        _ct("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32), _mxfp4, "MXFP4"
    ),
    "modelopt-fp8": Kind(
        _modelopt("FP8"),
        lambda r, c, g: Stored(
            (made := _fp8(None, None, "weight_scale")(r, c, g)).tensors
            | {"weight_scale": made.tensors["weight_scale"].reshape(()), "input_scale": torch.tensor(0.5)},
            made.values,
        ),
        "FP8 with one scale for each tensor",
    ),
    "modelopt-fp8-row": Kind(
        _modelopt("FP8_PER_CHANNEL_PER_TOKEN"),
        lambda r, c, g: Stored(
            (made := _fp8(1, None, "weight_scale")(r, c, g)).tensors
            | {"weight_scale": made.tensors["weight_scale"].flatten()},
            made.values,
        ),
        "FP8 with a scale for each row",
    ),
    "modelopt-nvfp4": Kind(_modelopt("NVFP4"), _nvfp4(False), "NVFP4"),
}


def write(
    directory: Path, kind: str, names: tuple[str, ...] = ("a", "b.c"), dtype: str = "bfloat16", **entry: Any
) -> dict[str, Stored]:
    """A checkpoint with a plain embedding and weights ``NAME.weight`` of one kind; returns them by name."""
    generator = torch.Generator().manual_seed(len(kind))
    made = {name: KINDS[kind].make(*KINDS[kind].shape, generator) for name in names}
    tensors = {f"{name}.{end}": tensor for name, one in made.items() for end, tensor in one.tensors.items()}
    tensors["embed.weight"] = torch.randn(16, 8, generator=generator).bfloat16()
    config = {"model_type": "tiny", "dtype": dtype, "quantization_config": KINDS[kind].entry | entry}
    save(directory, config, tensors)
    return made


def save(directory: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write a checkpoint of one file."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))


def store_linears(
    source: Path,
    target: Path,
    entry: dict[str, Any],
    store: Callable[[str, Tensor], dict[str, Tensor]],
    wanted: Callable[[str], bool] = lambda name: "_proj" in name and name.endswith(".weight"),
) -> Path:
    """A copy of a checkpoint in which ``store(name, weight)`` says how the wanted weights are stored."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
    stored: dict[str, Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        stored |= store(name, tensor) if wanted(name) else {name: tensor}
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": entry}
    save(target, config, {name: tensor.contiguous() for name, tensor in stored.items()})
    return target

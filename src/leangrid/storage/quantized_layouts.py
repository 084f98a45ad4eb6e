"""Which stored tensors are the codes, scales and zero points of which weight: FP8, MXFP4 and ModelOpt's.

Names, dtypes and shapes decide, so that what a quantizer left plain is read plain whatever the config lists. What
config.json says of blocks, bits and symmetry is compared with what is stored."""

import math
import re
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from leangrid.errors import CheckpointError
from leangrid.storage.dequantize import EXPONENTS, DequantizedInfo, Kind, Layout
from leangrid.storage.dtypes import COMPUTED, DTYPES
from leangrid.storage.safetensors import TensorInfo

KNOWN = (
    "FP8 (quant_method fp8, mxfp8 or fbgemm_fp8), MXFP4 (mxfp4), compressed-tensors (float-, int-, naive-, pack-, "
    "nvfp4-pack-, mxfp4-pack- and mxfp8-quantized) and modelopt (FP8, NVFP4, MXFP8)"
)
WAY_OUT = f"Give the original, unquantized checkpoint; of quantized ones leangrid reads {KNOWN}"
DAMAGED = "Download the checkpoint again, or give the original, unquantized one"

FP8 = ("F8_E4M3", "F8_E5M2")
_ALGORITHMS = (
    "FP8",
    "FP8_PER_CHANNEL_PER_TOKEN",
    "FP8_PB_WO",
    "FP8_PB_REAL",
    "NVFP4",
    "W4A16_NVFP4",
    "W4A8_NVFP4_FP8",
    "MXFP8",
    "MXFP4",
    "W4A8_MXFP4_FP8",
    "MIXED_PRECISION",  # each layer names its own
)
# Ends of the names of what only computing in fewer bits needs: scales of activations and of the key-value cache.
ACTIVATIONS = re.compile(
    r"(^|\.|proj_)(input|activation|output)_(global_)?(scale|zero_point)$|\.[qkv]_(global_)?(scale|zero_point)$"
    r"|\.(qscale_act|input_scale_ub)$"
)
_SCALES = re.compile(r"(^|[._])(scale|scale_inv|scale_2|scales|qscale_weight|zero_point|weight_shape|weight_g_idx)$")


@dataclass(frozen=True)
class Source:
    """A checkpoint whose weights are quantized: ``entry`` is what its config says of it, ``stored`` the tensors in its
    files, ``dtype`` the name in safetensors of the one that weights are dequantized to, and ``read`` reads one."""

    directory: Path
    entry: Mapping[str, Any]
    stored: Mapping[str, TensorInfo]
    dtype: str
    read: Callable[[TensorInfo], Tensor]

    def matrix(
        self,
        kind: Kind,
        parts: Mapping[str, str | None],
        *,
        stated: tuple[int, int] | None = None,
        cols: int | None = None,
        bits: int = 8,
        through: torch.dtype = torch.float32,
        transposed: bool = False,
    ) -> DequantizedInfo:
        """The weight that is stored in ``parts``: role -> name, None for one that it does not have.

        Args:
            stated: (rows, cols) that share a scale by config.json; None: by the shape of the scales.
            cols: of packed integers.

        Raises:
            CheckpointError: the scales do not fit the codes, or have a dtype that scales do not have.
        """
        names = {role: name for role, name in parts.items() if name is not None}
        infos = {role: self.stored[name] for role, name in names.items()}
        codes, scale = infos["codes"], infos["scale"]
        if len(codes.shape) not in ((4,) if transposed else (2, 3)) or not math.prod(codes.shape):
            what = f"'{names['codes']}' is stored in {codes.dtype} and has shape {list(codes.shape)}: no matrix"
            raise CheckpointError(what, codes.file, WAY_OUT)
        *before, rows, width = codes.shape if not transposed else (*codes.shape[:-2], math.prod(codes.shape[-2:]))
        wide = cols or width * (2 if kind == "fp4" else 1)
        block = _block((rows, wide), tuple(before), scale.shape, stated)
        if block is None:
            what = f"the scale '{names['scale']}' has shape {list(scale.shape)}, which does not fit {[rows, wide]}"
            raise CheckpointError(what + (f" in blocks of {stated[0]} x {stated[1]}" if stated else ""),
                                  codes.file, DAMAGED)  # fmt: skip
        if scale.dtype not in (*COMPUTED, "F64", *EXPONENTS) and not (kind == "fp4" and scale.dtype == FP8[0]):
            raise CheckpointError(f"the scale '{names['scale']}' is stored in {scale.dtype}", codes.file, DAMAGED)
        layout = Layout(kind, bits, block, scale.dtype in EXPONENTS, through, transposed)
        shape = (*before, wide, rows) if transposed else (*before, rows, wide)
        size = math.prod(shape) * DTYPES[self.dtype].itemsize
        return DequantizedInfo(codes.file, self.dtype, shape, 0, size, layout, infos, names)

    def partner(self, name: str, *candidates: str) -> str:
        """The name, one of ``candidates``, of the scale of the codes ``name``. CheckpointError if there is none."""
        found = next((one for one in candidates if one in self.stored), None)
        if found is None:
            info = self.stored[name]
            raise CheckpointError(
                f"'{name}' is stored in {info.dtype}, and its scale '{candidates[0]}' is missing", info.file, DAMAGED
            )
        return found

    def codes(self, *dtypes: str) -> Iterator[str]:
        """The names of tensors in one of ``dtypes`` that are no scales."""
        for name, info in self.stored.items():
            if info.dtype in dtypes and not _SCALES.search(name) and not ACTIVATIONS.search(name):
                yield name

    def has(self, name: str) -> str | None:
        """``name`` if it is stored."""
        return name if name in self.stored else None


def _block(
    matrix: tuple[int, int], before: tuple[int, ...], scale: tuple[int, ...], stated: tuple[int, int] | None
) -> tuple[int, int] | None:
    """(rows, cols) of the values that share a scale; None where the shape of the scales does not fit."""
    rows, cols = matrix
    if scale[: len(before)] != before:
        return None
    grid = scale[len(before) :]
    if len(grid) == 4 and grid[1] == grid[3] == 1:  # ModelOpt's, of 128 x 128 blocks
        grid = (grid[0], grid[2])
    if len(grid) > 2 or 0 in grid or (len(grid) == 1 and grid[0] not in (1, rows)):
        return None
    high, wide = (*grid, 1, 1)[:2]
    if stated is not None:
        return stated if (high, wide) == (-(-rows // stated[0]), -(-cols // stated[1])) else None
    return (rows // high, cols // wide) if rows % high == 0 and cols % wide == 0 else None


Found = Iterator[tuple[str, DequantizedInfo]]


def fp8(source: Source) -> Found:
    """FP8 as transformers' fp8, mxfp8 and fbgemm_fp8 store it, and FP4 experts beside it (DeepSeek-V4)."""
    stated = source.entry.get("weight_block_size")
    if stated is not None and not _is_pair(stated):
        what = f"weight_block_size is {str(stated)[:40]!r}, not a list of two numbers"
        raise CheckpointError(what, source.directory / "config.json", "Write the rows and columns that share a scale")
    block = None if stated is None else (stated[0], stated[1])
    usual = "_scale" if source.entry.get("quant_method") == "fbgemm_fp8" else "_scale_inv"

    def scales(name: str) -> tuple[str, ...]:
        owner = name.rpartition(".")[0]
        return name + usual, f"{owner}.scale", f"{owner}.qscale_weight"

    for name in source.codes(*FP8):
        yield name, source.matrix("float", {"codes": name, "scale": source.partner(name, *scales(name))}, stated=block)
    for name in source.codes("I8"):
        scale = next((one for one in scales(name) if one in source.stored), None)
        if scale is not None:
            yield name, source.matrix("fp4", {"codes": name, "scale": scale}, bits=4)


def mxfp4(source: Source) -> Found:
    """MXFP4 as gpt-oss stores it: [experts, rows, groups, 16] bytes; the weight is the transposed, as transformers'
    model holds it."""
    for name in source.stored:
        weight = name.removesuffix("_blocks")
        if weight == name:
            continue
        info, scale = source.stored[name], source.partner(name, f"{weight}_scales")
        if info.dtype != "U8" or len(info.shape) != 4 or info.shape[-1] != 16 or not math.prod(info.shape):
            what = f"'{name}' holds {info.dtype} {list(info.shape)}, not 16 bytes for each group of 32 values"
            raise CheckpointError(what, info.file, DAMAGED)
        parts = {"codes": name, "scale": scale}
        yield weight, source.matrix("fp4", parts, stated=(1, 32), bits=4, transposed=True)


def modelopt(source: Source) -> Found:
    """FP8, NVFP4, MXFP8 and MXFP4 as NVIDIA's ModelOpt stores them (its "unified Hugging Face checkpoint")."""
    said = source.entry.get("quantization", source.entry)
    said = said if isinstance(said, Mapping) else {}
    layers = said.get("quantized_layers")
    rows = [row for row in layers.values() if isinstance(row, Mapping)] if isinstance(layers, Mapping) else []
    algorithms = [row.get("quant_algo") for row in (said, *rows)]
    for algorithm in algorithms:
        if algorithm is not None and str(algorithm).upper() not in _ALGORITHMS:
            raise unknown(source, f"modelopt quant_algo {str(algorithm)[:40]!r}")
    smoothed = next((name for name in source.stored if name.endswith(("pre_quant_scale", "svdquant_lora_a"))), None)
    if smoothed is not None:
        raise unknown(source, f"modelopt with '{smoothed}', by which inputs are changed")
    blocks = str(said.get("quant_algo")).upper().startswith("FP8_PB")
    for name in source.codes(*FP8):
        parts = {"codes": name, "scale": source.partner(name, f"{name}_scale")}
        yield name, source.matrix("float", parts, stated=(128, 128) if blocks else None)
    for name in source.codes("U8"):
        scale = source.partner(name, f"{name}_scale")
        if source.stored[scale].dtype in EXPONENTS:
            yield name, source.matrix("fp4", {"codes": name, "scale": scale}, stated=(1, 32), bits=4)
        else:
            parts = {"codes": name, "scale": scale, "scale_2": source.partner(name, f"{name}_scale_2")}
            yield name, one_number(source.matrix("fp4", parts, stated=(1, 16), bits=4), "scale_2")


def scale_without_codes(stored: Mapping[str, TensorInfo], parts: Container[str]) -> tuple[str, str] | None:
    """A scale that belongs to none of the ``parts``, and the plain weight beside it; None: there is none."""
    for name in stored:
        weight = _SCALES.sub("", name)
        named = weight != name and (weight.endswith("weight") or name.endswith("_scale_inv"))
        if named and name not in parts and weight in stored and stored[weight].dtype in (*COMPUTED, "F64"):
            return name, weight
    return None


def one_number(info: DequantizedInfo, role: Literal["scale_2", "global_scale"]) -> DequantizedInfo:
    """``info`` itself, or CheckpointError where its second scale is not one float32 for each matrix."""
    part = info.parts[role]
    if part.dtype not in COMPUTED or math.prod(part.shape) != math.prod(info.shape[:-2]):
        what = f"'{info.names[role]}' holds {part.dtype} {list(part.shape)}, not one number"
        raise CheckpointError(what, part.file, DAMAGED)
    return info


def _is_pair(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(type(item) is int and item > 0 for item in value)


def unknown(source: Source, what: str) -> CheckpointError:
    """The error for weights in a layout that leangrid does not read; ``what`` names it."""
    return CheckpointError(f"the checkpoint is already quantized: {what}", source.directory / "config.json", WAY_OUT)

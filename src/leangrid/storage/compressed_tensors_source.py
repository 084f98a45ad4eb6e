"""Which stored tensors are the codes, scales and zero points of which weight in a checkpoint of compressed-tensors.

Layouts and meaning are those of its package (compressors/, quantization/lifecycle/forward.py). Integers of 3, 5, 6 and
7 bits are packed without holes since its version 0.18; 0.17 and older put as many whole ones into a word as fit. The
number of words tells, of narrow matrices that of the others."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from leangrid.errors import CheckpointError
from leangrid.storage.dequantize import EXPONENTS, DequantizedInfo, Kind, packed_words
from leangrid.storage.dtypes import COMPUTED, DTYPES
from leangrid.storage.quantized_layouts import DAMAGED, FP8, Found, Source, one_number, unknown
from leangrid.storage.safetensors import TensorInfo

_FORMATS = (
    "dense",
    "float-quantized",
    "int-quantized",
    "naive-quantized",
    "pack-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
    "mixed-precision",  # each group names its own
)
_Parts = dict[str, str | None]  # role of a stored tensor -> its name; None: there is none


def compressed_tensors(source: Source) -> Found:
    """FP8, INT8, INT4 and other integers, NVFP4, MXFP4 and MXFP8 as compressed-tensors stores them."""
    groups, packed = _groups(source), list[tuple[str, DequantizedInfo]]()
    for name in source.codes(*FP8, "I8"):
        parts: _Parts = {"codes": name, "scale": source.partner(name, f"{name}_scale")}
        parts["zero_point"] = source.has(f"{name}_zero_point")
        yield name, _of_group(source, groups, name, parts, "int" if source.stored[name].dtype == "I8" else "float")
    for name in source.codes("I32", "U8"):
        weight = name.removesuffix("_packed")
        if weight == name:
            continue
        parts: _Parts = {"codes": name, "scale": source.partner(name, f"{weight}_scale")}
        parts["zero_point"] = source.has(f"{weight}_zero_point")
        if source.stored[name].dtype == "U8":
            parts["global_scale"] = source.has(f"{weight}_global_scale")
            yield weight, _of_group(source, groups, weight, parts, "fp4")
        else:
            parts["groups"] = source.has(f"{weight}_g_idx")  # its older versions, where columns were sorted
            parts["shape"] = source.partner(name, f"{weight}_shape")
            packed.append((weight, _of_group(source, groups, weight, parts, "packed")))
    yield from _packed_alike(packed)


def _packed_alike(packed: list[tuple[str, DequantizedInfo]]) -> Found:
    """Packed weights; where one of them has holes, so have those whose number of words does not tell."""
    holes = any(info.layout.holes for _, info in packed)
    for name, info in packed:
        cols, bits = info.shape[-1], info.layout.bits
        if holes and packed_words(cols, bits) == packed_words(cols, bits, holes=True):
            info = replace(info, layout=replace(info.layout, holes=True))
        if (zero := info.parts.get("zero_point")) is not None:
            _check_zero_point(info, zero, info.names["zero_point"], (info.layout.holes,))
        yield name, info


@dataclass(frozen=True)
class _Group:
    """A scheme of compressed-tensors: which modules have it, and how their weights are stored."""

    targets: tuple[str, ...]
    integers: bool
    bits: int
    strategy: str
    size: int
    structure: tuple[int, int]
    symmetric: bool

    def block(self, rows: int, cols: int) -> tuple[int, int]:
        """(rows, cols) of a matrix that share a scale."""
        return {"tensor": (rows, cols), "channel": (1, cols), "block": self.structure}.get(
            self.strategy, (1, self.size)
        )

    def matches(self, module: str) -> int:
        """How closely it names ``module``: 3 by its name, 2 by a pattern, 1 by a class, 0 not at all."""
        if module in self.targets:
            return 3
        patterns = [target[3:] for target in self.targets if target.startswith("re:")]
        if any(re.match(pattern, module) for pattern in patterns):
            return 2
        return int(any(target.isidentifier() for target in self.targets))


def _groups(source: Source) -> list[_Group]:
    """The schemes of the config, or CheckpointError for what leangrid does not read."""
    entry = source.entry
    try:
        rows = [row for row in (entry.get("config_groups") or {}).values() if isinstance(row, Mapping)]
        sparsity = (entry.get("sparsity_config") or {}).get("format")
        rotations = (entry.get("transform_config") or {}).get("config_groups")
        groups = [_group(row) for row in rows if row.get("weights")]
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError, re.error) as error:
        where = source.directory / "config.json"
        raise CheckpointError(f"config_groups cannot be used: {str(error)[:100]}", where, DAMAGED) from error
    for said in (entry.get("format"), *(row.get("format") for row in rows)):
        if said is not None and said not in _FORMATS:
            raise unknown(source, f"compressed-tensors format {str(said)[:40]!r}")
    if sparsity not in (None, "dense"):
        raise unknown(source, f"compressed-tensors sparsity {str(sparsity)[:40]!r}")
    if rotations:
        raise unknown(source, "compressed-tensors with rotations (transform_config)")
    return groups


def _group(row: Mapping[str, Any]) -> _Group:
    weights, targets = row["weights"], tuple(str(target) for target in row.get("targets") or ())
    for target in targets:
        re.compile(target.removeprefix("re:") if target.startswith("re:") else "")
    size, structure = weights.get("group_size"), weights.get("block_structure") or (1, 1)
    structure = structure.split("x") if isinstance(structure, str) else structure
    strategy = weights.get("strategy")
    if strategy is None:  # as compressed-tensors completes it
        strategy = "tensor" if size is None else "channel" if int(size) < 0 else "group"
    if strategy not in ("tensor", "channel", "group", "tensor_group", "block"):
        raise ValueError(f"strategy {str(strategy)[:40]!r} is none of weights")
    bits, pair = int(weights.get("num_bits", 8)), (int(structure[0]), int(structure[1]))
    if not 1 <= bits <= 8 or min(pair) < 1 or ("group" in strategy and int(size or 0) < 1):
        raise ValueError(f"{bits} bits, group_size {size}, block_structure {list(pair)}")
    integers = str(weights.get("type", "int")) == "int"
    return _Group(targets, integers, bits, strategy, int(size or 1), pair, bool(weights.get("symmetric", True)))


def _of_group(source: Source, groups: Sequence[_Group], weight: str, parts: _Parts, kind: Kind) -> DequantizedInfo:
    """The weight as the first scheme stores it that fits, those that name its module most closely first."""
    module = weight.rpartition(".")[0]
    integers, wide = kind in ("int", "packed"), {"fp4": 4, "float": 8}.get(kind)
    fitting = [g for g in groups if g.integers == integers and wide in (None, g.bits)]
    refusal: CheckpointError | None = None
    if len(fitting) > 1:
        fitting.sort(key=lambda group: -group.matches(module))
    for group in fitting:
        try:
            return _with_scheme(source, group, parts, kind)
        except CheckpointError as error:
            refusal = refusal or error
    codes = source.stored[str(parts["codes"])]
    said = f"'{parts['codes']}' is stored in {codes.dtype}, of which config_groups says nothing"
    raise refusal or CheckpointError(said, source.directory / "config.json", DAMAGED)


def _with_scheme(source: Source, group: _Group, parts: _Parts, kind: Kind) -> DequantizedInfo:
    codes, scale = source.stored[str(parts["codes"])], source.stored[str(parts["scale"])]
    zero = parts.get("zero_point")
    if (zero is not None) == group.symmetric:
        what = (
            f"'{zero}' is a zero point, but the scheme of config.json is symmetric"
            if zero
            else f"'{parts['codes']}' has no zero point, but the scheme of config.json is not symmetric"
        )
        raise CheckpointError(what, codes.file, DAMAGED)
    rows, cols = codes.shape[-2], codes.shape[-1] * (2 if kind == "fp4" else 1)
    holes = False
    if kind == "packed":
        cols, holes = _packed_cols(source, group, parts)
    through = torch.bfloat16 if kind == "fp4" or scale.dtype in EXPONENTS else DTYPES[scale.dtype]
    through = through if through in (torch.bfloat16, torch.float16) else torch.float32
    stated = group.block(rows, cols)
    info = source.matrix(kind, parts, stated=stated, cols=cols, bits=group.bits, through=through)
    if holes:
        info = replace(info, layout=replace(info.layout, holes=True))
    if zero is not None:
        _check_zero_point(info, source.stored[zero], zero)
    if (groups := parts.get("groups")) is not None:
        held = source.stored[groups]
        if held.shape != (cols,) or held.dtype not in ("I32", "I64") or group.strategy != "group":
            what = f"'{groups}' holds {held.dtype} {list(held.shape)}, not the group of each of {cols} columns"
            raise CheckpointError(what, codes.file, DAMAGED)
    return one_number(info, "global_scale") if "global_scale" in info.parts else info


def _packed_cols(source: Source, group: _Group, parts: _Parts) -> tuple[int, bool]:
    """The columns of packed integers: as many as the groups of the scales have, else as stored beside them; and whether
    there are more words than they need without holes."""
    codes, scale = source.stored[str(parts["codes"])], source.stored[str(parts["scale"])]
    shape = source.stored[str(parts["shape"])]
    if len(codes.shape) != 2 or math.prod(shape.shape) != 2 or shape.dtype not in ("I64", "I32"):
        raise CheckpointError(
            f"'{parts['codes']}' and '{parts['shape']}' tell no rows and columns", codes.file, DAMAGED
        )
    if "group" in group.strategy and len(scale.shape) == 2:
        cols, said = scale.shape[1] * group.size, parts["scale"]
    else:
        (rows, cols), said = (int(number) for number in source.read(shape)), parts["shape"]
        if rows != codes.shape[0]:
            raise CheckpointError(f"'{said}' says {rows} rows, not {codes.shape[0]}", codes.file, DAMAGED)
    found = [holes for holes in (False, True) if packed_words(cols, group.bits, holes) == codes.shape[1]]
    if cols < 1 or not found:
        what = (
            f"'{parts['codes']}' has {codes.shape[1]} words a row, not those of {cols} integers of {group.bits} bits, "
            f"the columns of '{said}'"
        )
        raise CheckpointError(what, codes.file, DAMAGED)
    return cols, found[0]


def _check_zero_point(
    info: DequantizedInfo, zero: TensorInfo, name: str, packings: Sequence[bool] = (False, True)
) -> None:
    """CheckpointError if there is not one zero point for each scale; ``packings``: whether packed ones may have
    holes."""
    scale, rows = info.parts["scale"], info.shape[-2]
    grids: list[tuple[int, ...]] = [scale.shape]
    if zero.dtype == "I32" and info.layout.kind == "packed":
        grids = [(packed_words(rows, info.layout.bits, holes), scale.shape[-1]) for holes in packings]
    if zero.shape not in grids or zero.dtype not in ("I8", "I32", "F8_E4M3", *COMPUTED):
        what = f"the zero point '{name}' holds {zero.dtype} {list(zero.shape)}, the scales are {list(scale.shape)}"
        raise CheckpointError(what, zero.file, DAMAGED)

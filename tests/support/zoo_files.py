"""The files of a result read without leangrid: weights unpacked from the layouts that docs/formats.md specifies, put
back into a checkpoint with the source's names, which plain transformers opens."""

import itertools
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

_EXPERT = re.compile(r"(.*)\.(\d+)\.([\w.]+)\.(weight|bias)")
# (tensors, config.json) -> (the quantized weights as ``<linear>.weight``, the other tensors)
Unpack = Callable[[dict[str, Tensor], dict], tuple[dict[str, Tensor], dict[str, Tensor]]]
_PACKED = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")


@dataclass
class Refilled:
    """The source's tensors with what a result stores in their places.

    Attributes:
        tensors: by the source's names.
        quantized: names of those that hold quantized weights.
        changed: names of others whose bytes differ, which must be none.
        lost, new: names of the source that the result lacks, and names that only the result has.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    quantized: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a directory's safetensors files."""
    found: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        found |= load_file(file)
    return found


def refill(source: Path, result: Path, transposed: bool, unpack: Unpack | None = None) -> Refilled:
    """Read both directories and put the result's weights in the places of the source's.

    Args:
        transposed: the model's linears store [cols, rows] (Conv1D).
        unpack: reads the result's container; None: ``unpacked``, for compressed-tensors and lut.
    """
    theirs, ours = read_tensors(source), read_tensors(result)
    dense, rest = (unpack or unpacked)(ours, json.loads((result / "config.json").read_text(encoding="utf-8")))
    made = Refilled()
    for name, weight in dense.items():
        if name in theirs:
            cols = theirs[name].shape[0 if transposed else -1]
            weight = weight[:, :cols].T if transposed else weight[:, :cols]  # a last word may be filled up
            made.tensors[name] = weight.contiguous().to(theirs[name].dtype)
            made.quantized.append(name)
    apart = {name: x for name, x in rest.items() if name not in theirs}
    kinds = {x.dtype for x in theirs.values() if x.is_floating_point()}
    for name in sorted(dense.keys() - theirs.keys()):  # a reader gives them in the type of the source
        weight = dense[name].T.contiguous() if transposed else dense[name]
        apart[name] = weight.to(*kinds) if len(kinds) == 1 else weight
    used = _put_experts_together(theirs, apart, rest, made)
    for name, tensor in rest.items():
        if name in theirs:
            made.tensors[name] = tensor
            if tensor.dtype != theirs[name].dtype or not torch.equal(tensor, theirs[name]):
                made.changed.append(name)
    made.new = sorted(apart.keys() - used)
    made.tensors |= {name: apart[name] for name in made.new}
    made.lost = sorted(theirs.keys() - made.tensors.keys())
    return made


def write(refilled: Refilled, source: Path, directory: Path) -> Path:
    """A checkpoint of the refilled tensors with the source's config."""
    directory.mkdir(parents=True)
    save_file({n: x.contiguous() for n, x in refilled.tensors.items()}, directory / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    for file in source.glob("*.json"):
        if not file.name.endswith("index.json"):
            shutil.copy(file, directory / file.name)
    return directory


# ---------------------------------------------------------------- layouts


def unpacked(tensors: dict[str, Tensor], config: dict) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The quantized weights of a result as float32 [rows, cols] by ``<linear>.weight``, and its other tensors."""
    rest, dense = dict(tensors), {}
    for name in sorted(tensors):
        owner, _, leaf = name.rpartition(".")
        if leaf == "weight_packed":
            dense[f"{owner}.weight"] = _affine({part: rest.pop(f"{owner}.{part}", None) for part in _PACKED}, config)
        elif leaf == "lut":
            table = rest.pop(name).float()
            bits = int(table.shape[1]).bit_length() - 1
            codes = rest.pop(f"{owner}.weight")
            cols = codes.shape[1] * 32 // bits
            dense[f"{owner}.weight"] = table.gather(1, _codes(codes, bits, cols))
    return dense, rest


def _affine(parts: dict[str, Tensor | None], config: dict) -> Tensor:
    """S (q - Z) of compressed-tensors' pack-quantized layout."""
    packed, scale, shape, zero = (parts[leaf] for leaf in _PACKED)
    if packed is None or scale is None or shape is None:
        raise ValueError("a packed layer lacks a part")
    groups = config["quantization_config"]["config_groups"]
    (bits,) = {group["weights"]["num_bits"] for group in groups.values()}
    rows, cols = shape.tolist()
    codes = _codes(packed, bits, cols).float()
    middle = torch.full(scale.shape, 2.0 ** (bits - 1))
    zeros = middle if zero is None else _codes(zero.T.contiguous(), bits, rows).T.float()
    width = cols // scale.shape[1]
    return (codes - zeros.repeat_interleave(width, 1)) * scale.float().repeat_interleave(width, 1)


def _codes(words: Tensor, bits: int, count: int) -> Tensor:
    """``count`` codes a row from 32-bit words, the first in the lowest bits; int64."""
    if 32 % bits:
        raise ValueError(f"{bits} bits do not divide a word")
    numbers = words.contiguous().numpy().view(np.uint32)
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    codes = (numbers[:, :, None] >> shifts) & np.uint32(2**bits - 1)
    return torch.from_numpy(codes.reshape(len(numbers), -1)[:, :count].astype(np.int64))


# ---------------------------------------------------------------- experts that the source holds in one tensor


def _put_experts_together(
    theirs: dict[str, Tensor], apart: dict[str, Tensor], rest: dict[str, Tensor], made: Refilled
) -> set[str]:
    """Fill the source's fused tensors from one matrix an expert; the names that were used."""
    mixtures: dict[str, dict[str, dict[int, Tensor]]] = {}
    for name, tensor in apart.items():
        found = _EXPERT.fullmatch(name)
        if found:
            parts = mixtures.setdefault(found[1], {}).setdefault(f"{found[3]}.{found[4]}", {})
            parts[int(found[2])] = tensor
    used: set[str] = set()
    for path, parts in mixtures.items():
        block = re.search(r"\w+\.\d+\.", f"{path}.")
        near = block[0] if block else ""  # such as layers.3., wherever that list lies in the source
        for name in [n for n in theirs if near in n and n not in made.tensors and n not in rest]:
            fused = theirs[name]
            stacks = {
                part: torch.stack([found[e] for e in range(len(found))])
                for part, found in parts.items()
                if len(found) == fused.shape[0] and (part.endswith("bias") == (fused.ndim == 2))
                if {x.shape for x in found.values()} == {found[min(found)].shape}  # else layers that differ
                if found.keys() == set(range(len(found)))
            }
            best = _closest(fused, stacks)
            if best is not None and best[0] < 0.95:
                made.tensors[name], taken = best[1].contiguous().to(fused.dtype), best[2]
                used |= {_spelled(path, e, part) for part in taken for e in range(fused.shape[0])} & apart.keys()
                if fused.ndim == 3:
                    made.quantized.append(name)
                elif not torch.equal(made.tensors[name], fused):
                    made.changed.append(name)
    return used


def _spelled(path: str, expert: int, part: str) -> str:
    return f"{path}.{expert}.{part}" if path else f"{expert}.{part}"


def _closest(fused: Tensor, stacks: dict[str, Tensor]) -> tuple[float, Tensor, tuple[str, ...]] | None:
    """The arrangement of parts that has the shape of ``fused`` and is nearest to it: its error, itself, its parts."""
    found: list[tuple[float, Tensor, tuple[str, ...]]] = []
    for names in [*((name,) for name in stacks), *itertools.permutations(stacks, 2)]:
        parts = [stacks[name] for name in names]
        if len({x.shape for x in parts}) > 1:
            continue
        arranged = [torch.cat(parts, 1), torch.stack(parts, 2).flatten(1, 2)] if len(parts) > 1 else parts
        for way in arranged:
            for tensor in (way, way.mT) if way.ndim == 3 else (way,):
                if tensor.shape == fused.shape:
                    error = float((tensor.float() - fused.float()).norm() / fused.float().norm().clamp_min(1e-20))
                    found.append((error, tensor, names))
    return min(found, key=lambda one: one[0], default=None)

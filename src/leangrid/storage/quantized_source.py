"""Checkpoints whose weights are stored in fewer bits than 16: what they are, and the tensors that they hold once
dequantized.

Nothing is dequantized here. Each weight gets a ``DequantizedInfo``, which says what has to be read for it; scales and
zero points are no tensors of the checkpoint any more, and its config has no quantization entry."""

from collections import Counter
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from leangrid.errors import CheckpointError
from leangrid.storage.compressed_tensors_source import compressed_tensors
from leangrid.storage.dequantize import DequantizedInfo
from leangrid.storage.dtypes import COMPUTED, DTYPES, FLOATS, NAMES, dtype_of, torch_name
from leangrid.storage.foreign import QUANTIZATION_KEYS, find_quantized_form
from leangrid.storage.manifest import is_result
from leangrid.storage.quantized_layouts import (
    ACTIVATIONS,
    DAMAGED,
    WAY_OUT,
    Found,
    Source,
    fp8,
    modelopt,
    mxfp4,
    scale_without_codes,
)
from leangrid.storage.safetensors import TensorInfo, parse_strict_json

MODELOPT = "hf_quant_config.json"  # where ModelOpt says what config.json of its older checkpoints does not
_METHODS: dict[str, Callable[[Source], Found]] = {
    "fp8": fp8,
    "mxfp8": fp8,
    "fbgemm_fp8": fp8,
    "mxfp4": mxfp4,
    "modelopt": modelopt,
    "compressed-tensors": compressed_tensors,
}


@dataclass(frozen=True)
class StoredAs:
    """What the weights of a source are stored in.

    Attributes:
        method: ``quant_method`` of its config, such as ``fp8``.
        what: the kinds of weights in words, such as ``FP8 with 128 x 128 scales``.
        tensors: how many tensors are dequantized.
        bytes: what all tensors of the checkpoint, scales included, take in its files.
        entry: the quantization entry of its config.
    """

    method: str
    what: str
    tensors: int
    bytes: int
    entry: Mapping[str, Any]


def open_quantized(
    config: Mapping[str, Any],
    stored: Mapping[str, TensorInfo],
    directory: Path,
    read: Callable[[TensorInfo], Tensor],
    notices: list[str],
) -> tuple[dict[str, TensorInfo], StoredAs] | None:
    """The tensors of a checkpoint whose config says that it is quantized, under the names and in the shapes that they
    have once dequantized, and what they are stored in; None where the config does not say so.

    Args:
        stored: the tensors in its files.
        read: reads one of them; only shapes that no header tells are read.
        notices: gets a sentence for the user.

    Raises:
        CheckpointError: the weights are in a layout that leangrid does not read, are plain, or their parts are missing
            or do not fit each other.
    """
    said = find_entry(config, directory)
    if said is None:
        return None
    where, method, entry = said
    if is_result(directory):
        what = f"this is a result of leangrid, already quantized ({where}: {method})"
        raise CheckpointError(what, directory, "Give the checkpoint that it was made of")
    if method not in _METHODS:
        _refuse_plain(stored, where, method, directory)
        raise CheckpointError(f"the checkpoint is already quantized ({where}: {method})", directory, WAY_OUT)
    dtype = _dtype(config)
    found = dict(_METHODS[method](Source(directory, entry, stored, NAMES[DTYPES[dtype]], read)))
    parts = {name for info in found.values() for name in info.names.values()}
    left_out = [name for name in stored if name not in parts and ACTIVATIONS.search(name)]
    if not found and not left_out:
        _refuse_plain(stored, where, method, directory)
        raise CheckpointError(f"the checkpoint is already quantized ({where}: {method})", directory, WAY_OUT)
    if lone := scale_without_codes(stored, parts):
        plain = f"'{lone[0]}' is the scale of no codes: '{lone[1]}' is stored in plain {stored[lone[1]].dtype}"
        raise CheckpointError(plain, stored[lone[0]].file, DAMAGED)
    tensors = _dequantized(stored, found, parts)
    kinds = Counter(describe(info) for info in found.values())
    what = " and ".join(kind for kind, _ in kinds.most_common())
    if found:
        notices.append(
            f"the source is stored in {what}: {len(found)} tensors are dequantized to "
            f"{torch_name(DTYPES[dtype])} as they are read"
        )
    if left_out:
        notices.append(
            f"'{left_out[0]}'{f' and {len(left_out) - 1} more' if len(left_out) > 1 else ''}: scales of activations or "
            "of the key-value cache, which the result does not use, are left out"
        )
    return tensors, StoredAs(method, what, len(found), sum(info.nbytes for info in stored.values()), entry)


def _dequantized(
    stored: Mapping[str, TensorInfo], found: Mapping[str, DequantizedInfo], parts: Container[str]
) -> dict[str, TensorInfo]:
    """The tensors in the order of the files: those ``found`` in the place of their codes, plain ones as they are."""
    tensors: dict[str, TensorInfo] = {}
    at = {info.names["codes"]: (name, info) for name, info in found.items()}
    for name, info in stored.items():
        if name in at:
            tensors[at[name][0]] = at[name][1]
        elif name not in parts and not ACTIVATIONS.search(name):
            if name in found:
                what = f"'{name}' is stored twice, plain and as codes"
                raise CheckpointError(what, info.file, "Get another copy of the checkpoint")
            tensors[name] = info
    return tensors


def find_entry(config: Mapping[str, Any], directory: Path) -> tuple[str, str, Mapping[str, Any]] | None:
    """Where a checkpoint says that its weights are quantized, by which method, and its words; None if it does not.

    Raises CheckpointError if what it says is empty or no object."""
    sections = [config, *(value for value in config.values() if isinstance(value, dict))]
    said = [(key, one[key]) for one in sections for key in QUANTIZATION_KEYS if one.get(key) is not None]
    where = directory / "config.json"
    if not said and (beside := _modelopt_file(directory)):
        return MODELOPT, "modelopt", beside
    if not said:
        return None
    key, entry = said[0]
    if not entry:
        raise CheckpointError(f"config.json has an empty {key}, which no reader understands", where, f"Remove {key}")
    if not isinstance(entry, dict):
        raise CheckpointError(f"the checkpoint is already quantized ({key}: unnamed)", where, WAY_OUT)
    method = str(entry.get("quant_method", "mlx" if key == "quantization" else "unnamed"))[:40]
    return key, method, entry


def is_only_dequantized(entry: object) -> bool:
    """Whether a config's quantization entry is of weights that leangrid dequantizes as it reads them, and computes with
    in no other way: all layouts that it reads except packed integers."""
    if not isinstance(entry, Mapping) or entry.get("quant_method") not in _METHODS:
        return False
    groups = entry.get("config_groups") or {}
    rows = [entry, *(row for row in groups.values() if isinstance(row, Mapping))] if isinstance(groups, Mapping) else []
    packed = any(row.get("format") == "pack-quantized" for row in rows)
    return entry["quant_method"] != "compressed-tensors" or not packed


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without the entries that say that weights are quantized, at the top and in its sections."""
    return {
        key: {k: v for k, v in value.items() if k not in QUANTIZATION_KEYS} if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in QUANTIZATION_KEYS
    }


def describe(info: DequantizedInfo) -> str:
    """What a tensor is stored in, in words: ``FP8 with 128 x 128 scales``, ``INT4 in groups of 32``, ``MXFP4``."""
    layout, (high, wide) = info.layout, info.layout.block
    rows, cols = reversed(info.shape[-2:]) if layout.transposed else info.shape[-2:]
    if layout.kind == "fp4":
        return "NVFP4" if wide == 16 else "MXFP4" if layout.exponents and wide == 32 else f"FP4 in groups of {wide}"
    if layout.kind == "float" and layout.exponents and (high, wide) == (1, 32):
        return "MXFP8"
    name = "FP8" if layout.kind == "float" else f"INT{layout.bits}"
    if high >= rows and wide >= cols and rows > 1:
        return f"{name} with one scale for each tensor"
    if high == 1:
        return f"{name} with a scale for each row" if wide >= cols else f"{name} in groups of {wide}"
    return f"{name} with {high} x {wide} scales"


def _dtype(config: Mapping[str, Any]) -> str:
    """The dtype, as safetensors names it, to which weights are dequantized: the config's; BF16 where it names none that
    engines compute in."""
    sections = [config, *(value for value in config.values() if isinstance(value, dict))]
    said = (dtype_of(section.get(key)) for section in sections for key in ("dtype", "torch_dtype"))
    return next((NAMES[dtype] for dtype in said if dtype is not None and NAMES[dtype] in COMPUTED), "BF16")


def _modelopt_file(directory: Path) -> Mapping[str, Any] | None:
    """What ModelOpt wrote beside config.json; None where there is no such file or it is not ModelOpt's."""
    path = directory / MODELOPT
    if not path.is_file() or path.stat().st_size > 16 << 20:
        return None
    said = parse_strict_json(path.read_bytes(), path)
    return said if isinstance(said, dict) and isinstance(said.get("quantization"), dict) else None


def _refuse_plain(stored: Mapping[str, TensorInfo], key: str, method: str, directory: Path) -> None:
    """Raise CheckpointError if no tensor looks quantized, although the config says so."""
    matrices = {info.dtype for info in stored.values() if len(info.shape) > 1}
    if find_quantized_form(stored) or matrices - set(FLOATS) or not matrices:
        return
    plain = " and ".join(sorted(matrices))
    what = f"config.json says that the weights are quantized ({key}: {method}), but they are plain {plain}"
    raise CheckpointError(
        what, directory / "config.json", f"If these are the original weights, remove {key} from config.json"
    )

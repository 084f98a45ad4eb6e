"""Compares a GGUF file with the directory that was made of it, independently of the code that made it (gguf.py).

gguf-py reads the file, safetensors the directory. Names and orders of rows are those of the export (gguf_names.py);
where it does not know the architecture, sums over the weights of each block are compared. The rotary angles are
computed twice: by transformers from config.json, by llama.cpp's formulas from the header."""

import copy
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from safetensors import safe_open
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from leangrid.errors import ArchitectureError, CheckpointError
from leangrid.models import gguf_names
from leangrid.storage.dtypes import COMPUTED
from leangrid.storage.gguf_shards import list_parts

_FLOAT32 = 1e-6  # relative: what two computations of a number in float32 may differ by
_SUMS = 1e-4  # relative: what sums of a block's weights may differ by where one side is in bfloat16
_SHOWN = 6  # differences that are reported
_VALUES = 1 << 22  # weights that are compared at once
_ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
# llama.cpp's field -> transformers' names of it; the first that a config has is compared.
_SIZES = {
    "embedding_length": ("hidden_size", "n_embd"),
    "block_count": ("num_hidden_layers", "n_layer"),
    "attention.head_count": ("num_attention_heads", "n_head"),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
    "attention.layer_norm_epsilon": ("layer_norm_epsilon",),
    "expert_used_count": ("num_experts_per_tok",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
}


def check_against_file(path: Path, directory: Path) -> list[str]:
    """List the differences between a GGUF model and the directory that was made of it, a sentence each; [] for none.

    Args:
        path: the .gguf file, or any part of a split one.
        directory: config.json and safetensors files.

    Raises:
        CheckpointError: one of the two cannot be read.
    """
    try:
        readers = [gguf.GGUFReader(str(part)) for part in list_parts(path)]
        config = json.loads((directory / "config.json").read_text())
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise CheckpointError(f"cannot be read for a second look: {error}", path, "Check the disk") from error
    header = {
        key: field.contents() for key, field in readers[0].fields.items() if not key.startswith(("GGUF.", "tokenizer."))
    }
    tensors = {tensor.name: tensor for reader in readers for tensor in reader.tensors}
    problems = [*_sizes(header, config), *_angles(header, tensors, config)]
    weights = {name: tensor for name, tensor in tensors.items() if name not in _ROPE_TENSORS}
    names = _names(config)
    problems += _tensors(weights, directory, names) if names is not None else _sums(weights, directory, config)
    return problems[:_SHOWN]


def _sizes(header: dict[str, Any], config: dict[str, Any]) -> Iterator[str]:
    """Yield a sentence for each size that differs between header and config.json."""
    arch = header["general.architecture"]
    for key, names in _SIZES.items():
        name = next((name for name in names if config.get(name) is not None), None)
        given = header.get(f"{arch}.{key}")
        # layer_norm_epsilon beside that of RMSNorm is not used.
        if given is None or (name is None and (not given or key == "attention.layer_norm_epsilon")):
            continue
        ours = None if name is None else config[name]
        if name is None or ours is None or not math.isclose(ours, given, rel_tol=_FLOAT32):
            yield f"{arch}.{key} is {given}, config.json's {name or names[0]} {ours}"
    hidden, heads = header[f"{arch}.embedding_length"], header[f"{arch}.attention.head_count"]
    size = header.get(f"{arch}.attention.key_length", hidden // heads)
    ours = config.get("head_dim") or (config.get("hidden_size") or config["n_embd"]) // (
        config.get("num_attention_heads") or heads
    )
    if size != ours:
        yield f"a head has {size} dimensions in the file, {ours} by config.json"


def _names(config: dict[str, Any]) -> gguf_names.GgufModel | None:
    """The names of the export; None for a model that it does not know. Rotary scaling is left out, which names do not
    depend on and the export may refuse."""
    rope = copy.deepcopy(config.get("rope_parameters") or {})
    for part in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if "rope_theta" in part:
            theta = part["rope_theta"]
            part.clear()
            part |= {"rope_type": "default", "rope_theta": theta}
    try:
        return gguf_names.describe({**copy.deepcopy(config), "rope_parameters": rope}, "")
    except ArchitectureError:
        return None


def _angles(header: dict[str, Any], tensors: dict[str, Any], config: dict[str, Any]) -> Iterator[str]:
    """Yield a sentence where rotary frequencies or the attention factor differ, in short or in long texts."""
    arch = header["general.architecture"]
    if not config.get("rope_parameters"):
        return
    plain: Any = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(config))
    nested = "full_attention" in plain.rope_parameters
    rope = plain.rope_parameters["full_attention"] if nested else plain.rope_parameters
    size = header.get(
        f"{arch}.attention.key_length", header[f"{arch}.embedding_length"] // header[f"{arch}.attention.head_count"]
    )
    dims = header.get(f"{arch}.rope.dimension_count", size)
    for long in (False, True):
        expected, factor = _llama_cpp(header, tensors, dims, long)
        got, attention = _transformers(plain, rope, size, long, "full_attention" if nested else None)
        if got.shape != expected.shape or not np.allclose(got, expected, rtol=1e-5, atol=0):
            yield f"rotary scaling: the file's frequencies differ from those of config.json ({rope.get('rope_type')})"
            return
        if not math.isclose(attention, factor, rel_tol=1e-5):
            yield f"rotary scaling: the file's attention factor is {factor:.6g}, config.json's {attention:.6g}"
            return
    if nested:
        base = header.get(f"{arch}.rope.freq_base_swa", 10000.0)
        if not math.isclose(plain.rope_parameters["sliding_attention"]["rope_theta"], base, rel_tol=_FLOAT32):
            yield f"{arch}.rope.freq_base_swa is {base}, config.json has another"


def _llama_cpp(header: dict[str, Any], tensors: dict[str, Any], dims: int, long: bool) -> tuple[np.ndarray, float]:
    """ggml's rope: the frequencies in radians per position, f64 [dims / 2], and the attention factor."""
    get: Callable[..., Any] = lambda key, default: header.get(f"{header['general.architecture']}.rope.{key}", default)  # noqa: E731
    kind, base = get("scaling.type", "linear"), get("freq_base", 10000.0)
    scale = (get("scaling.factor", get("scale_linear", 0.0)) or 1.0) if kind != "none" else 1.0
    plain = base ** (-np.arange(0, dims, 2) / dims)
    for name in ("rope_freqs.weight", f"rope_factors_{'long' if long else 'short'}.weight"):
        if name in tensors:
            plain = plain / np.asarray(tensors[name].data, dtype=np.float64)
            break
    factor = float(get("scaling.attn_factor", 1.0) or 1.0)
    if kind != "yarn" or scale == 1.0:
        return plain / scale, factor
    context = header[f"{header['general.architecture']}.context_length"]
    original = get("scaling.original_context_length", context) or context
    ends = [dims * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))
            for turns in (get("scaling.yarn_beta_fast", 32.0), get("scaling.yarn_beta_slow", 1.0))]  # fmt: skip
    low, high = max(0, math.floor(ends[0])), min(dims - 1, math.ceil(ends[1]))
    ramp = 1 - np.clip((np.arange(dims // 2) - low) / max(0.001, high - low), 0, 1)
    whole = 0.1 * math.log(scale) + 1.0
    factor *= whole / (0.1 * get("scaling.yarn_log_multiplier", 0.0) * math.log(scale) + 1.0)
    return plain / scale * (1 - ramp) + plain * ramp, factor


def _transformers(
    plain: Any, rope: dict[str, Any], size: int, long: bool, layer: str | None
) -> tuple[np.ndarray, float]:
    """transformers\' frequencies and attention factor, as ``_llama_cpp`` gives them."""
    kind = rope.get("rope_type", "default")
    dims = int(size * rope.get("partial_rotary_factor", 1.0))
    if kind == "default":
        return rope["rope_theta"] ** (-np.arange(0, dims, 2) / dims), 1.0
    length = rope.get("original_max_position_embeddings", 1) + 1 if long else None
    more = {} if layer is None else {"layer_type": layer}
    found, attention = ROPE_INIT_FUNCTIONS[kind](plain, torch.device("cpu"), length, **more)
    return found.double().numpy(), float(attention)


def _open(directory: Path) -> dict[str, Any]:
    """The safetensors file of each tensor, by name."""
    return {name: file for file in sorted(directory.glob("*.safetensors")) for name in safe_open(file, "pt").keys()}  # noqa: SIM118


def _get(files: dict[str, Any], name: str) -> Tensor:
    with safe_open(files[name], "pt") as opened:
        return opened.get_tensor(name)


def _tensors(tensors: dict[str, Any], directory: Path, names: gguf_names.GgufModel) -> Iterator[str]:
    """Yield a sentence for each tensor that is missing on one side or differs in a value."""
    files, left = _open(directory), dict(tensors)
    for name in files:
        ours = _get(files, name)
        try:
            found = left.pop(names.tensor_name(name), None)
        except ArchitectureError as error:
            yield error.what
            continue
        place = (found, 0) if found is not None else _part_of_fused(tensors, names, name, ours)
        if place is None:
            if bool(ours.any()) or not name.endswith(".bias"):  # a bias of zeros is none
                yield f"{name} is not in the file"
            continue
        order = names.row_order(name, ours.shape[0])
        shift = 1.0 if names.norm_plus_one and name.endswith("norm.weight") else 0.0
        stored, first = place
        left.pop(stored.name, None)
        if not _same(stored, first, ours, order, shift):
            yield f"{name} holds other numbers than {stored.name}"
    yield from (f"{name} of the file is not in the directory" for name in left)


def _part_of_fused(
    tensors: dict[str, Any], names: gguf_names.GgufModel, name: str, ours: Tensor
) -> tuple[Any, int] | None:
    """The tensor that fuses queries, keys and values, and the row at which ``name`` begins in it; None where there is
    none."""
    match = re.search(r"layers\.(\d+)\.self_attn\.([qkv])_proj\.weight", name)
    stored = None if match is None else tensors.get(f"blk.{match[1]}.attn_qkv.weight")
    if match is None or stored is None:
        return None
    rows = int(stored.shape[1])
    keys = (rows - ours.shape[0]) // 2 if match[2] == "q" else ours.shape[0]
    return stored, {"q": 0, "k": rows - 2 * keys, "v": rows - keys}[match[2]]


def _same(stored: Any, first: int, ours: Tensor, order: Tensor | None, shift: float) -> bool:
    """Whether all values are equal, after rounding to the directory's dtype where the file has blocks."""
    flat, data = ours.reshape(-1, ours.shape[-1]), stored.data.reshape(-1, stored.data.shape[-1])
    if ours.numel() * len(data) != stored.n_elements * len(flat):
        return False
    if ours.ndim == 1 and order is not None:
        flat, order = flat[:, order], None
    step = max(1, _VALUES // flat.shape[1])
    for start in range(0, len(flat), step):
        rows = np.array(data[first + start : first + min(start + step, len(flat))])
        values = torch.from_numpy(gguf.dequantize(rows, stored.tensor_type).astype(np.float32))
        mine = flat[start : start + step] if order is None else flat[order[start : start + step]]
        if shift:
            equal = torch.allclose(mine.float() + shift, values, rtol=0, atol=1e-6)
        else:
            equal = torch.equal(
                mine.float(), values if stored.tensor_type.name in COMPUTED else values.to(mine.dtype).float()
            )
        if not equal:
            return False
    return True


def _sums(tensors: dict[str, Any], directory: Path, config: dict[str, Any]) -> Iterator[str]:
    """Yield a sentence for each block whose weights differ in number, sum or sum of squares, and one for all tensors
    outside of blocks where those do."""
    shifted = config["model_type"].startswith("gemma")
    file: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(3))
    for name, stored in tensors.items():
        block = re.match(r"blk\.(\d+)\.", name)
        data = stored.data.reshape(-1, stored.data.shape[-1])
        step = max(1, _VALUES // int(stored.shape[0]))
        for start in range(0, len(data), step):
            values = gguf.dequantize(np.array(data[start : start + step]), stored.tensor_type).astype(np.float64)
            values -= 1.0 if shifted and name.endswith("norm.weight") else 0.0
            file[block[1] if block else "all"] += (values.size, values.sum(), np.square(values).sum())
    own: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(3))
    files = _open(directory)
    for name in files:
        block = re.search(r"\.(?:layers|h)\.(\d+)\.", name)
        values = _get(files, name)
        if name.endswith(".bias") and not bool(values.any()) and values.numel():
            continue  # the file may leave out a bias of zeros
        for piece in values.reshape(-1).split(_VALUES):
            own[block[1] if block else "all"] += (
                piece.numel(),
                float(piece.double().sum()),
                float(piece.double().square().sum()),
            )
    for block in sorted({*file, *own}):
        one, other = file[block], own[block]
        scale = math.sqrt(max(one[0] * one[2], 1e-30))  # the largest sum of numbers with this sum of squares
        if (
            one[0] != other[0]
            or abs(one[1] - other[1]) > _SUMS * scale
            or not math.isclose(one[2], other[2], rel_tol=100 * _SUMS)
        ):
            where = "the tensors outside of the blocks hold" if block == "all" else f"block {block} holds"
            yield f"{where} other weights in the file than in the directory"

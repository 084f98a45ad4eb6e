"""A .gguf file as a checkpoint: dequantized once into a directory with config.json and safetensors files, 512 MB at a
time.

The header says what the model is (gguf_families.py); gguf-py has llama.cpp's names of the tensors and dequantizes its
blocks. Before a weight is read every tensor of transformers' class must be found in the file, and every tensor of the
file must have its place in the class."""

import copy
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import torch
import transformers
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from leangrid.errors import ArchitectureError, CheckpointError
from leangrid.models import gguf_tokenizer
from leangrid.models.gguf_families import Family, family_of
from leangrid.models.gguf_fields import Fields, can_dequantize, read_rows, rows_at_once
from leangrid.models.model_class import empty_model, with_experts_apart
from leangrid.models.shapes import DescribedCheckpoint, TensorShape
from leangrid.models.stored import mixtral_name
from leangrid.storage import files, safetensors
from leangrid.storage.dtypes import NAMES, plain_dtype, torch_name
from leangrid.storage.gguf import Field
from leangrid.storage.gguf_header import Header, StoredTensor, begins_as_gguf, read_header
from leangrid.storage.gguf_shards import list_parts, read_model_header

_INTEGERS = ("I8", "I16", "I32", "I64")
# Fields of transformers' config objects that no config.json needs.
_OBJECT_FIELDS = ("_name_or_path", "torch_dtype", "id2label", "label2id")
_MAX_BLOCKS = 10_000  # as in storage/config.py
_SHARD = 512 << 20  # bytes of weights in one safetensors file, which are in memory until it is written
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_OF_QKV = re.compile(r"blk\.\d+\.attn_([qkv])\.(weight|bias)")
_WAY_OUT = "Give a complete file, or the model's own checkpoint (safetensors and config.json) as SOURCE"


@dataclass(frozen=True)
class Part:
    """Where a tensor of the checkpoint lies in the file, and how it is converted.

    Attributes:
        stored: the tensor of the file; None for a bias that the file leaves out, which is zeros.
        first, count: its rows that are meant.
        shape: of the checkpoint's tensor.
        heads: None, or the number of heads whose rows are permuted from the original Llama's order to transformers'.
        transposed: rows become columns.
        shift: is added to every value.
    """

    stored: StoredTensor | None
    first: int
    count: int
    shape: tuple[int, ...]
    heads: int | None = None
    transposed: bool = False
    shift: float = 0.0


@dataclass(frozen=True)
class GgufSource:
    """What the header of a GGUF model means: config.json, the dtype of most weights, and each tensor's place in the
    file."""

    header: Header
    config: dict[str, Any]
    dtype: torch.dtype
    tensors: dict[str, Part]


def is_gguf(path: Path) -> bool:
    """Whether ``path`` is named ``*.gguf``, or begins with GGUF's magic bytes as in caches that name files by hash."""
    return path.suffix.lower() == ".gguf" or begins_as_gguf(path)


def all_files(path: Path) -> list[Path]:
    """The files of the model that ``path`` belongs to: itself, or all parts of a split model. CheckpointError where a
    part is missing."""
    return list_parts(path)


def dequantizing_bytes(weights: Iterable[int]) -> int:
    """The peak memory of ``dequantize`` in bytes, for tensors with these numbers of weights: the tensors of one file of
    the result, and the largest one once more while its rows are permuted."""
    sizes = [4 * count for count in weights]
    largest = max(sizes, default=0)
    return min(sum(sizes), max(_SHARD, largest)) + largest


def open_gguf(path: Path) -> GgufSource:
    """Translate the header of a GGUF model into transformers' terms, without reading a weight.

    Raises:
        CheckpointError: the file or a part of it is missing or damaged; its architecture, a field, a type of weights or
            its tokenizer is not known here; tensors are missing from it or have no place in the model.
    """
    header = read_model_header(path)
    fields = Fields(header, _architecture(header))
    family = family_of(fields)
    config = family.config(fields)
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError("tensors are missing from the GGUF file: token_embd.weight", path, _WAY_OUT)
    layers = config.get("num_hidden_layers", config.get("n_layer", 0))
    if layers > min(_MAX_BLOCKS, len(header.tensors)):
        raise CheckpointError(
            f"its header announces {layers} blocks, and the file holds {len(header.tensors)} tensors", path, _WAY_OUT
        )
    config |= {"vocab_size": embedding.shape[0], "tie_word_embeddings": "output.weight" not in header.tensors}
    config |= gguf_tokenizer.special_ids(header)
    fields.refuse_unread()
    gguf_tokenizer.check_tokenizer(header, embedding.shape[0])
    for name, stored in header.tensors.items():
        if stored.kind in _INTEGERS or not can_dequantize(stored.kind):
            raise CheckpointError(
                f"the tensor {name} is stored as {stored.kind}, which cannot be made weights", path, _WAY_OUT
            )
    dtype = _dtype(header)
    config = _completed(path, config, dtype)
    return GgufSource(header, config, dtype, _placed(fields, family, config))


def _architecture(header: Header) -> str:
    kind = header.value("general.type", "model")
    if kind == "adapter" or "adapter.type" in header.fields:
        raise CheckpointError(
            "this GGUF file is a LoRA adapter, not a model", header.file, "Merge it into its base model first"
        )
    arch = header.value("general.architecture")
    if kind != "model" or not isinstance(arch, str):
        what = f"general.type is {kind!r}" if kind != "model" else "general.architecture is missing"
        raise CheckpointError(
            f"this GGUF file holds no language model: {what}", header.file, "Give the file of the model itself"
        )
    return arch


def _dtype(header: Header) -> torch.dtype:
    """The dtype of most weights of the file's matrices; bfloat16 where most are quantized in blocks."""
    counts: dict[torch.dtype, int] = {}
    for stored in header.tensors.values():
        if len(stored.shape) > 1:
            dtype = plain_dtype(stored.kind) or torch.bfloat16
            counts[dtype] = counts.get(dtype, 0) + torch.Size(stored.shape).numel()
    return max(counts, key=lambda dtype: counts[dtype])


def _completed(path: Path, config: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The whole config.json: what the header says, completed by transformers' defaults."""
    try:
        whole = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(config)).to_dict()
    except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise CheckpointError(f"no config can be made of its header: {error}", path, _WAY_OUT) from error
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config["model_type"]]
    whole |= copy.deepcopy(config) | {"architectures": [name], "dtype": torch_name(dtype)}
    return json.loads(json.dumps({key: value for key, value in whole.items() if key not in _OBJECT_FIELDS}))


def _placed(fields: Fields, family: Family, config: dict[str, Any]) -> dict[str, Part]:
    """Where each tensor of transformers' class lies; CheckpointError where file and class disagree."""
    header = fields.header
    model = with_experts_apart(empty_model(DescribedCheckpoint(header.file, config, {})))
    number = next(number for number, text in gguf.MODEL_ARCH_NAMES.items() if text == fields.arch)
    table = gguf.get_tensor_name_map(number, config.get("num_hidden_layers", config.get("n_layer", 0)))
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    found: dict[str, Part] = {}
    used, missing, wrong = set(fields.vectors), [], []
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in tied:
            continue
        if config["model_type"] == "mixtral":  # under the names of Mixtral's own checkpoints
            name = mixtral_name(name)
        theirs = table.get_name(_EXPERT.sub(".experts.", name), try_suffixes=(".weight", ".bias"))
        place = None if theirs is None else _place(header, theirs, name, tuple(tensor.shape), config)
        if place is None:
            if theirs is not None and _zero_bias(header, family, theirs):
                found[name] = Part(None, 0, 0, tuple(tensor.shape))
            else:
                missing.append(theirs or name)
            continue
        part, source = place
        used.add(source)
        found[name] = part = _as_stored(part, family, name, tuple(tensor.shape), config)
        if not _fits(part):
            shape = list(part.stored.shape) if part.stored else []
            wrong.append(f"{source} has shape {shape}, the header asks for {list(part.shape)}")
    extra = [name for name in header.tensors if name not in used]
    for problem, names in (
        ("tensors are missing from the GGUF file", missing),
        (f"the GGUF file holds tensors that have no place in a {config['architectures'][0]}", extra),
        ("header and tensors of the GGUF file disagree", wrong),
    ):
        if names:
            more = f"; and {len(names) - 4} more" if len(names) > 4 else ""
            raise CheckpointError(f"{problem}: {'; '.join(dict.fromkeys(names[:4]))}{more}", header.file, _WAY_OUT)
    return found


def _place(
    header: Header, theirs: str, name: str, shape: tuple[int, ...], config: dict[str, Any]
) -> tuple[Part, str] | None:
    """Where the tensor lies that llama.cpp calls ``theirs`` and transformers ``name``, and in which tensor of the file:
    one of its own, or one that fuses experts, or queries, keys and values. None where it is in none."""
    expert = _EXPERT.search(name)
    if expert is not None:
        number = int(expert[1])
        single = theirs.replace("_exps.", f".{number}.")  # how files of 2024 name one matrix of one expert
        if single in header.tensors:
            return Part(header.tensors[single], 0, header.tensors[single].rows, shape), single
        stored = header.tensors.get(theirs)
        if stored is None or len(stored.shape) != 3 or number >= stored.shape[0]:
            return None
        return Part(replace(stored, shape=stored.shape), number * stored.shape[1], stored.shape[1], shape), theirs
    stored = header.tensors.get(theirs)
    if stored is not None:
        return Part(stored, 0, stored.rows, shape), theirs
    match = _OF_QKV.fullmatch(theirs)
    fused = theirs.replace(f"attn_{match[1]}.", "attn_qkv.") if match else ""
    stored = header.tensors.get(fused)
    if match is None or stored is None or match[2] != "weight":
        return None
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    counts = [config["num_attention_heads"] * size, *[config["num_key_value_heads"] * size] * 2]
    which = "qkv".index(match[1])
    return (Part(stored, sum(counts[:which]), counts[which], shape), fused) if stored.rows == sum(counts) else None


def _zero_bias(header: Header, family: Family, theirs: str) -> bool:
    """Whether ``theirs`` is a bias that llama.cpp leaves out where no block of the file has it."""
    end = next((end for end in family.zero_biases if theirs.endswith(f".{end}")), None)
    return end is not None and not any(name.endswith(f".{end}") for name in header.tensors)


def _as_stored(part: Part, family: Family, name: str, shape: tuple[int, ...], config: dict[str, Any]) -> Part:
    """The part with the conversions that its family and its name ask for."""
    heads = {".q_proj.": "num_attention_heads", ".k_proj.": "num_key_value_heads"}
    permuted = next((config[key] for text, key in heads.items() if text in name), None) if family.permuted else None
    transposed = config["model_type"] == "gpt2" and len(shape) == 2 and ".h." in name
    return replace(
        part, heads=permuted, transposed=transposed, shift=-1.0 if family.norm_plus_one and "norm." in name else 0.0
    )


def _fits(part: Part) -> bool:
    """Whether the stored shape is the one that the checkpoint's tensor needs."""
    stored = part.stored
    if stored is None:
        return True
    shape = (part.count, stored.shape[-1]) if len(stored.shape) > 1 else stored.shape
    wanted = part.shape[::-1] if part.transposed else part.shape
    if part.heads and wanted[0] % (2 * part.heads):
        return False
    # A gate of one row is stored as a vector.
    return shape == wanted or (len(wanted) == 2 and wanted[0] == 1 and shape == wanted[1:])


def _read(part: Part, dtype: torch.dtype) -> Tensor:
    """One tensor of the checkpoint in ``dtype``; in its own dtype where it is floats that ``dtype`` would round."""
    stored = part.stored
    if stored is None:
        return torch.zeros(part.shape, dtype=dtype)
    columns, dtype_read = stored.shape[-1], plain_dtype(stored.kind) or dtype
    vector = len(stored.shape) == 1
    made = torch.empty((1 if vector else part.count, columns), dtype=dtype_read)
    step = rows_at_once(stored)
    for first in range(0, len(made), step):
        count = min(step, len(made) - first)
        values = read_rows(stored, part.first + first, count)
        made[first : first + count] = values + part.shift if part.shift else values
    if part.heads is not None:  # pairs beside each other -> the two halves of a head
        length = made.numel() if vector else len(made)
        order = torch.arange(length).reshape(part.heads, -1, 2).transpose(1, 2).reshape(-1)
        made = made[:, order] if vector else made[order]
    made = (made.T if part.transposed else made).reshape(part.shape).contiguous()
    if made.dtype != dtype:
        narrow = made.to(dtype)
        made = narrow if torch.equal(narrow.to(made.dtype), made) else made
    return made


def _shards(source: GgufSource) -> Iterator[list[str]]:
    """Yield the names of the tensors of each file of the result."""
    held: list[str] = []
    size = 0
    for name, part in source.tensors.items():
        kind = source.dtype if part.stored is None else (plain_dtype(part.stored.kind) or source.dtype)
        nbytes = max(kind.itemsize, source.dtype.itemsize) * torch.Size(part.shape).numel()
        if held and size + nbytes > _SHARD:
            yield held
            held, size = [], 0
        held.append(name)
        size += nbytes
    yield held


def dequantize(path: Path, directory: Path) -> torch.dtype:
    """Write the GGUF model in ``path`` and its other parts to ``directory`` as config.json, safetensors files and
    tokenizer files.

    Returns:
        the dtype of most written weights: that of the file for floats, bfloat16 for blocks. Tensors of floats in
        another dtype keep it where the common one would round them.

    Raises:
        CheckpointError: as ``open_gguf``; or the file ends early.
        OutputError: the disk is full or not writable.
    """
    source = open_gguf(path)
    tokenizer = gguf_tokenizer.tokenizer_of(source.header)
    files.make_dir(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(str(directory))
    shards = list(_shards(source))
    total, names = 0, {}
    for number, held in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: _read(source.tensors[name], source.dtype) for name in held}
        safetensors.save(directory / file, tensors, {"format": "pt"})
        total += sum(tensor.nbytes for tensor in tensors.values())
        names |= dict.fromkeys(held, file)
        del tensors
    if len(shards) > 1:
        files.write_json(
            directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": names}
        )
    generation = gguf_tokenizer.generation_config(source.header)
    files.atomic_write(directory / "generation_config.json", json.dumps(generation, indent=2).encode())
    # Written last: a directory with config.json is complete.
    files.atomic_write(directory / "config.json", json.dumps(source.config, indent=2).encode())
    return source.dtype


def header(path: Path) -> dict[str, Field]:
    """Read the key-value fields of a GGUF file, by key.

    Raises:
        CheckpointError: the file is missing, no GGUF, or its header is damaged.
    """
    return read_header(path).fields


def describe(path: Path) -> DescribedCheckpoint:
    """Describe the checkpoint that ``dequantize`` would write, from the header alone. Raises as ``open_gguf`` does."""
    try:
        source = open_gguf(path)
    except ArchitectureError as error:
        raise CheckpointError(error.what, path, error.way_out) from error
    name, size = NAMES[source.dtype], source.dtype.itemsize
    shapes = {name_: (part.shape, torch.Size(part.shape).numel() * size) for name_, part in source.tensors.items()}
    return DescribedCheckpoint(
        path, source.config, {n: TensorShape(name, shape, nbytes) for n, (shape, nbytes) in shapes.items()}
    )

"""A finished result as one GGUF file for llama.cpp: the same weights, exactly, with the header and the tokenizer."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from leangrid.block_types import BLOCK_TYPES, BlockType
from leangrid.errors import CheckpointError, FormatError
from leangrid.formats import gguf_repack
from leangrid.grids import AffineGrid
from leangrid.models import gguf as existing
from leangrid.models import gguf_names
from leangrid.models.gguf_names import GgufModel
from leangrid.models.gguf_vocab import tokenizer_fields
from leangrid.models.result_reader import ResultReader
from leangrid.models.tokenizer import load_tokenizer
from leangrid.progress import Event, Progress
from leangrid.storage import disk, gguf
from leangrid.storage.gguf import PLAIN_TYPES, Field, TensorEntry
from leangrid.storage.safetensors import TensorInfo

FILE = "model.gguf"
_FLOAT32 = PLAIN_TYPES["F32"]
# llama.cpp's general.file_type, by the block type of most quantized weights; llama.cpp only shows it.
_FILE_TYPES = {
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q2_K": 10,
    "Q3_K": 12,
    "Q4_K": 15,
    "Q5_K": 17,
    "Q6_K": 18,
}
_NOT_COPIED = ("GGUF.", "split.", "quantize.", "general.file_type", "general.quantization_version", "general.alignment")
# Fields in which a file may differ from ours and still be of the same model.
_MAY_DIFFER = ("context_length", "vocab_size")


def write(result: ResultReader, staged: Path, like: Path | None, progress: Progress | None = None) -> float:
    """Write model.gguf into the directory ``staged``.

    Args:
        like: an existing GGUF file of the same model, whose header and tokenizer are copied; None: both are made from
            the checkpoint.

    Returns:
        The stored bits per quantized weight.

    Raises:
        ArchitectureError, FormatError, CheckpointError: GGUF cannot say something of the model exactly. Nothing is
            written then.
    """
    model = gguf_names.describe(result.checkpoint.config, _model_name(result))
    block_types = _block_types(result)
    notices = list(model.notices)
    fields = _header_of(like, model, _vocabulary_size(result)) if like else _new_header(result, model, notices)
    counts = [block_type.name for block_type in block_types.values()]
    fields |= {"general.file_type": Field("uint32", _FILE_TYPES[max(set(counts), key=counts.count)]),
               "general.quantization_version": Field("uint32", 2)}  # fmt: skip
    entries = _entries(result, model, block_types)
    if result.not_in_model:
        more = f" and {len(result.not_in_model) - 3} more" if len(result.not_in_model) > 3 else ""
        names = f"{', '.join(sorted(result.not_in_model)[:3])}{more}"
        notices.append(f"left out, since llama.cpp's {model.arch} has no place for them: {names}")
    if not result.has_lm_head:
        notices.append(
            "the model has no language-model head: llama.cpp takes the embeddings for one, "
            "so use the file for embeddings only"
        )
    if progress is not None:
        for message in notices:
            progress(Event("notice", message=message))
    disk.require_space(staged, sum(entry.nbytes for entry in entries.values()))
    gguf.save(staged / FILE, fields, entries)
    stored = sum(rows * block_types[name].row_bytes(cols) for name, (rows, cols) in result.layers.items())
    return round(8 * stored / sum(rows * cols for rows, cols in result.layers.values()), 4)


def _model_name(result: ResultReader) -> str:
    source = str(result.manifest.get("source_name") or result.directory.name)
    return source.rstrip("/").rsplit("/", 1)[-1]


def _block_types(result: ResultReader) -> dict[str, BlockType]:
    """Layer -> block type; FormatError for the first layer that no type holds exactly, its scales included."""
    if result.format.BLOCKS:
        return {
            name: BLOCK_TYPES[result.schemes[name].block or ""].fitting(cols)
            for name, (_, cols) in result.layers.items()
        }
    block_types = {}
    for name, (rows, cols) in result.layers.items():
        reason = gguf_repack.refuse(result.schemes[name], name, rows, cols, result.kinds[name])
        if reason:
            raise FormatError(reason)
        block_types[name] = gguf_repack.choose_block_type(result.schemes[name], cols)
    for stored in [f"{name}.weight_scale" for name in result.layers]:
        if stored in result.checkpoint.tensors:  # other containers hold scales in float16 already
            gguf_repack.check_scale(result.checkpoint.read(stored, check=False), stored)
    return block_types


def _vocabulary_size(result: ResultReader) -> int:
    """The number of rows of the embedding."""
    return next(
        info.shape[0] for name, info in result.checkpoint.tensors.items() if name.endswith("embed_tokens.weight")
    )


def _new_header(result: ResultReader, model: GgufModel, notices: list[str]) -> dict[str, Field]:
    """The header that config.json and the tokenizer make; ``notices`` gets sentences for the user."""
    tokenizer = load_tokenizer(result.directory)
    if tokenizer is None:
        raise CheckpointError(
            "there is no tokenizer to put into the file", result.directory, "Add its files, or use --like FILE.gguf"
        )
    tokens, more = tokenizer_fields(tokenizer, _vocabulary_size(result))
    notices += more
    return {**model.fields, **tokens}


def _header_of(like: Path, model: GgufModel, embeddings: int) -> dict[str, Field]:
    """The header of the file ``like``; CheckpointError where it is of another model."""
    found = {key: field for key, field in existing.header(like).items() if not key.startswith(_NOT_COPIED)}
    way_out = "Give a GGUF file of this very model, or leave --like out"
    for key, field in model.fields.items():
        other = found.get(key)
        if key == "general.name" or key.endswith(_MAY_DIFFER) or other is None:
            continue
        same = (
            math.isclose(field.value, other.value, rel_tol=1e-6)
            if field.kind == "float32"
            else field.value == other.value
        )
        if not same:
            raise CheckpointError(f"its {key} is {other.value!r}, this model's {field.value!r}", like, way_out)
    tokens = found.get("tokenizer.ggml.tokens")
    if tokens is None or len(tokens.value) != embeddings:
        count = "no" if tokens is None else len(tokens.value)
        raise CheckpointError(f"it has {count} tokens, this model {embeddings} embeddings", like, way_out)
    return {**model.fields, **found}


def _entries(result: ResultReader, model: GgufModel, block_types: Mapping[str, BlockType]) -> dict[str, TensorEntry]:
    """Every tensor of the file by llama.cpp's name, block by block; each is read when it is written."""
    entries: dict[str, TensorEntry] = {}
    for name, info in result.plain_tensors().items():
        if name in result.not_in_model:
            continue
        entries[model.tensor_name(name)] = _plain_entry(result, model, name, info)
    for name, (rows, cols) in result.layers.items():
        block_type = block_types[name]
        make = _BlockBytes(result, block_type, name, model.row_order(f"{name}.weight", rows))
        entries[model.tensor_name(f"{name}.weight")] = TensorEntry(
            (rows, cols), block_type.number, rows * block_type.row_bytes(cols), make
        )
    for name, tensor in model.extra.items():
        entries[name] = TensorEntry(tuple(tensor.shape), _FLOAT32, 4 * tensor.numel(), lambda tensor=tensor: tensor)
    return dict(sorted(entries.items(), key=lambda item: _position(item[0])))


def _position(name: str) -> tuple[int, int, str]:
    block = re.match(r"blk\.(\d+)\.", name)
    return (
        (1, int(block[1]), name)
        if block
        else (0 if name.startswith(("token_embd", gguf_names.ROPE_FREQS)) else 2, 0, name)
    )


@dataclass(frozen=True, eq=False)
class _BlockBytes:
    """A call makes the block bytes of one quantized linear."""

    result: ResultReader
    block_type: BlockType
    name: str
    order: Tensor | None

    def __call__(self) -> Tensor:
        codes, grid = self.result.layer(self.name)
        if self.result.format.BLOCKS:
            packed = self.result.format.pack(codes, grid, self.result.dtype, self.result.schemes[self.name])["weight"]
            return packed if self.order is None else packed[self.order]
        if not isinstance(grid, AffineGrid):
            raise FormatError(f"{type(grid).__name__} is no affine grid", self.name)
        packed = gguf_repack.pack_affine(self.block_type, codes, grid)
        return packed if self.order is None else packed[self.order]


def _plain_entry(result: ResultReader, model: GgufModel, name: str, info: TensorInfo) -> TensorEntry:
    """A tensor that is not quantized, as llama.cpp's operators read it: vectors in float32, matrices as stored."""
    if info.dtype not in PLAIN_TYPES:
        raise FormatError(
            f"GGUF holds no {info.dtype} weights", name, "Quantize a float32, float16 or bfloat16 checkpoint"
        )
    vector = len(info.shape) == 1
    order = model.row_order(name, info.shape[0])
    shift = 1.0 if model.norm_plus_one and name.endswith("norm.weight") else 0.0

    def make() -> Tensor:
        tensor = result.checkpoint.read(name)
        if order is not None:
            tensor = tensor[order]
        return (tensor.float() + shift) if vector else tensor.contiguous()

    number = _FLOAT32 if vector else PLAIN_TYPES[info.dtype]
    return TensorEntry(info.shape, number, math.prod(info.shape) * (4 if vector else info.torch_dtype.itemsize), make)

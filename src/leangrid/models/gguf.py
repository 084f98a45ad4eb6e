"""A .gguf file as a checkpoint: dequantized once into a plain directory, by transformers' own reader.

GGUF holds llama.cpp's names and its permuted q/k rows; transformers undoes both. The whole model is in memory while it is
converted (float32), the one place where leangrid does not go block by block.
"""

from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from leangrid.errors import CheckpointError
from leangrid.models.gguf_vocab import split_by_name
from leangrid.models.shapes import DescribedCheckpoint
from leangrid.storage import files, safetensors
from leangrid.storage.gguf import Field

# File types (GGUF's general.file_type) that hold plain floats keep their dtype; all others become bfloat16.
_PLAIN = {0: torch.float32, 1: torch.float16, 32: torch.bfloat16}
_MAGIC = b"GGUF"


def is_gguf(path: Path) -> bool:
    """Whether ``path`` is named like a GGUF file."""
    return path.suffix.lower() == ".gguf"


def dequantize(path: Path, directory: Path) -> torch.dtype:
    """Write the model in ``path`` to ``directory`` as config.json, model.safetensors and tokenizer files.

    Returns:
        the dtype of the written weights: the file's own for float files, bfloat16 for quantized ones.

    Raises:
        CheckpointError: the file is missing, no GGUF, damaged, or of a model transformers cannot read.
    """
    _check_magic(path)
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        where, name = str(path.parent), path.name
        model = AutoModelForCausalLM.from_pretrained(
            where, gguf_file=name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        said = _said(path)
        tokenizer = _tokenizer(path, said)
    except (ValueError, KeyError, OSError, RuntimeError, IndexError, NotImplementedError) as error:
        raise CheckpointError(
            f"the GGUF file cannot be read: {error}", path, "Check the download, or convert it with its own tools"
        ) from error
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
    dtype = _PLAIN.get(said.get("general.file_type", -1), torch.bfloat16)
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # pyright: ignore[reportAttributeAccessIssue]
    config.dtype, config.architectures = dtype, [type(model).__name__]
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    tensors = {n: t.to(dtype).contiguous() for n, t in model.state_dict().items() if n not in tied}
    files.make_dir(directory)
    tokenizer.save_pretrained(str(directory))
    if model.generation_config is not None:
        files.atomic_write(directory / "generation_config.json", model.generation_config.to_json_string().encode())
    safetensors.save(directory / "model.safetensors", tensors, {"format": "pt"})
    files.atomic_write(directory / "config.json", config.to_json_string(use_diff=False).encode())
    return dtype


def _tokenizer(path: Path, said: dict[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer of the file. Without a name for its rule (old files) it stays as transformers reads it."""
    tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    if said.get("tokenizer.ggml.model") == "gpt2" and said.get("tokenizer.ggml.pre", "default") != "default":
        split_by_name(tokenizer, said["tokenizer.ggml.pre"])
    return tokenizer


def _check_magic(path: Path) -> None:
    try:
        with path.open("rb") as stream:
            magic = stream.read(4)
    except OSError as error:
        raise CheckpointError(f"the file cannot be read: {error.strerror}", path, "Give the path of a .gguf file") from error
    if magic != _MAGIC:
        raise CheckpointError("this is no GGUF file: it does not begin with 'GGUF'", path, "Check the download")


def _said(path: Path) -> dict[str, Any]:
    """What the header says of the file's type and of the tokenizer's kind and rule; a key that it lacks is missing."""
    from gguf import GGUFReader

    reader = GGUFReader(str(path))  # walks the whole header: seconds where the vocabulary is large
    keys = ("general.file_type", "tokenizer.ggml.model", "tokenizer.ggml.pre")
    return {key: field.contents() for key in keys if (field := reader.get_field(key)) is not None}


def header(path: Path) -> dict[str, Field]:
    """The key-value fields of a GGUF file, by key, without the reader's own counts.

    Raises:
        CheckpointError: the file is missing, no GGUF, or its header is damaged.
    """
    from gguf import GGUFReader, GGUFValueType

    _check_magic(path)
    fields: dict[str, Field] = {}
    try:
        for key, field in GGUFReader(str(path)).fields.items():
            if not key.startswith("GGUF."):
                if field.types.count(GGUFValueType.ARRAY) > 1:
                    raise CheckpointError("an array of arrays, which leangrid does not copy", f"{path}: {key}")
                fields[key] = Field(field.types[-1].name.lower(), field.contents())
    except (ValueError, KeyError, IndexError, OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"its header cannot be read: {error}", path, "Check the download") from error
    return fields


def describe(path: Path) -> DescribedCheckpoint:
    """The checkpoint that ``dequantize(path, ...)`` would write, from the file's header alone."""
    _check_magic(path)
    try:
        config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError, OSError, RuntimeError, NotImplementedError) as error:
        raise CheckpointError(f"the GGUF file cannot be read: {error}", path, "Check the download") from error
    dtype = _PLAIN.get(_said(path).get("general.file_type", -1), torch.bfloat16)
    return DescribedCheckpoint.of(path, {**config.to_dict(), "architectures": [type(model).__name__]}, model, dtype)

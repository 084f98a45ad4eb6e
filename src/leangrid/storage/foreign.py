"""Recognises what is not an unquantized checkpoint, so that the error message can say what it is.

Git LFS pointers, LoRA adapters, and weights of other quantizers, by first bytes, file names and tensor names."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from leangrid.errors import CheckpointError
from leangrid.storage.dtypes import CODES

LFS_MARK = b"version https://git-lfs"  # the first line of a pointer (git-lfs, docs/spec.md)
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")  # the ends of the names of files that torch.save writes
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", re.compile(r"adapter_model.*\.safetensors")
QUANTIZATION_KEYS = ("quantization_config", "compression_config", "quantization")
_WAY_OUT = "Give the original, unquantized checkpoint"
# Ends of the names of buffers that old checkpoints store and today's modules compute.
OLD_BUFFERS = (
    "rotary_emb.inv_freq",
    "rotary_emb.cos_cached",
    "rotary_emb.sin_cached",
    "attn.bias",
    "attn.masked_bias",
    "embeddings.position_ids",
)
# Ends of the names of integer tables: causal masks and positions, which are no codes.
_INTEGER_TABLES = (*OLD_BUFFERS, "attention.bias", "masked_bias", "position_ids", "token_type_ids")

# Ends of tensor names that only quantized weights have -> what the weights are.
_FORMS = (
    (re.compile(r"\.(qweight|qzeros|g_idx)$"), "GPTQ or AWQ codes"),
    (re.compile(r"\.weight_packed$"), "compressed-tensors codes"),
    (
        re.compile(
            r"\.weight\.(absmax|quant_map|nested_absmax|quant_state\.bitsandbytes__\w+)$|\.weight_format$|\.SCB$"
        ),
        "bitsandbytes codes",
    ),
    (re.compile(r"_proj_blocks$"), "MXFP4 blocks"),
    (re.compile(r"\.(W_q|lut|weight_lut|qidxs|Qidxs|codebooks)$"), "codes of another quantizer"),
    (
        re.compile(r"(\.|_)(weight_scale_inv|weight_scale|weight_scale_2|input_scale|scale_inv)$"),
        "weights in 8 bits or fewer and their scales",
    ),
)
_ADAPTER = re.compile(
    r"(^|\.)(base_layer|modules_to_save|(lora|vera|hada|lokr|ia3|oft|boft|hra|fourierft|randlora|bone|adaption|prompt|prefix)_\w+)(\.|$)"
)
_NOT_MERGED = (
    "PROMPT_TUNING",
    "P_TUNING",
    "PREFIX_TUNING",
    "MULTITASK_PROMPT_TUNING",
    "ADAPTION_PROMPT",
)  # PEFT's own names
# Prefixes of tensor names of a model that was part of a larger one, or was saved by what trained it.
_WRAPPERS = (
    "base_model.model.",
    "_orig_mod.",
    "_fsdp_wrapped_module.",
    "module.",
    "language_model.model.",
    "model.language_model.",
    "language_model.",
    "text_model.",
    "llm.",
    "model.text_model.",
)


def is_pointer(start: bytes | bytearray | memoryview) -> bool:
    """Whether a file that begins with the bytes ``start`` is a Git LFS pointer, left in place of a large file."""
    return bytes(start[: len(LFS_MARK)]) == LFS_MARK


def pointer_error(path: Path) -> CheckpointError:
    """The error for a Git LFS pointer at ``path``."""
    return CheckpointError(
        f"'{path.name}' is a Git LFS pointer, not the file itself", path, "Fetch the files: git lfs pull"
    )


def refuse_adapter(directory: Path) -> None:
    """Raise CheckpointError if ``directory`` holds an adapter such as LoRA (PEFT's layout) but no model weights."""
    if not directory.is_dir():
        return
    names = [path.name for path in directory.iterdir()]
    adapter = ADAPTER_CONFIG in names or any(
        ADAPTER_WEIGHTS.fullmatch(name) or name == "adapter_model.bin" for name in names
    )
    weights = any(
        name.endswith((".safetensors", ".bin", ".safetensors.index.json")) and not name.startswith("adapter_")
        for name in names
    )
    if adapter and not weights:
        kind = _peft_type(directory / ADAPTER_CONFIG)
        merge = "Merge it into its base model first (PEFT: merge_and_unload, then save_pretrained)"
        way_out = "It cannot be merged into weights: give its base model" if kind in _NOT_MERGED else merge
        raise CheckpointError(f"this is a {kind.replace('LORA', 'LoRA')} adapter, not a model", directory, way_out)


def _peft_type(path: Path) -> str:
    """The kind of adapter that PEFT's config names; LORA if it names none."""
    try:
        said = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        said = None
    kind = said.get("peft_type") if isinstance(said, dict) else None
    return kind[:40] if isinstance(kind, str) and kind.isprintable() and kind else "LORA"


def list_adapter_notices(directory: Path) -> list[str]:
    """A sentence for the user if an adapter is beside the weights, because it is not applied; else an empty list."""
    names = [
        path.name
        for path in directory.iterdir()
        if path.name == ADAPTER_CONFIG or path.name.startswith("adapter_model")
    ]
    return (
        [f"{min(names)}: an adapter beside the weights is not applied and not copied; merge it first if it belongs"]
        if names
        else []
    )


def find_quantized_form(tensors: Mapping[str, Any]) -> tuple[str, str] | None:
    """The kind of quantized weights in ``tensors`` and the name of a tensor that shows it; None if there are none.

    Names and dtypes decide. ``tensors``: name -> anything with ``dtype`` (as safetensors names it) and ``shape``."""
    for name, info in tensors.items():
        if info.dtype.startswith(("F8_", "F4", "F6")):
            return f"fp8 weights ({info.dtype})", name
    for form, what in _FORMS:
        found = next((name for name in tensors if form.search(name)), None)
        if found is not None:
            return what, found
    for name, info in tensors.items():
        beside = {f"{name.rpartition('.')[0]}.{end}" for end in ("scales", "biases")}
        if info.dtype == "U32" and beside & tensors.keys():
            return "MLX codes", name
    return None


def refuse_disguised(tensors: Mapping[str, Any], directory: Path) -> None:
    """Raise CheckpointError if the weights are quantized although config.json does not say so.

    Call it only with tensors that do not fit the model, because names alone prove nothing."""
    form = find_quantized_form(tensors)
    if form is not None:
        raise CheckpointError(
            f"the checkpoint is already quantized: it holds {form[0]}, such as '{form[1]}', of which config.json says "
            "nothing that fits",
            directory,
            f"{_WAY_OUT}, or one with its own quantization_config: of those leangrid reads some (docs/sources.md)",
        )
    codes = [
        name
        for name, info in tensors.items()
        if len(info.shape) > 1 and info.dtype in CODES and not name.endswith(_INTEGER_TABLES)
    ]
    if codes:
        dtype = tensors[codes[0]].dtype
        what = f"matrices are stored as integers ({dtype}), such as '{codes[0]}': these are quantized weights"
        raise CheckpointError(what, directory, _WAY_OUT)


def explain_foreign_names(names: Iterable[str]) -> str | None:
    """Explain tensor names that the model does not have: where they come from and what to do; None if unknown."""
    listed = list(names)
    if found := next((name for name in listed if _ADAPTER.search(name)), None):
        return (
            f"'{found}' belongs to an adapter such as LoRA, saved without merging it. "
            "Merge it first (PEFT: merge_and_unload)"
        )
    for wrapper in _WRAPPERS:
        inside = [name for name in listed if name.startswith(wrapper)]
        if inside and len(inside) * 2 >= len(listed):
            return (
                f"the names begin with '{wrapper}': they are of a model inside of another. "
                "Give the whole model's checkpoint with its own config.json, or one that was saved without the prefix"
            )
    if found := next(
        (name for name in listed if re.fullmatch(r"layers\.\d+\.(attention|feed_forward)\.w[a-z0-9]+\.weight", name)),
        None,
    ):
        return (
            f"'{found}' is a name of Meta's and Mistral's own format. "
            "Convert the checkpoint to Hugging Face's format first"
        )
    return None

"""A quantized directory -> a transformers model that runs, on our packed layers."""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from leangrid import hf_quantizer
from leangrid.errors import ArchitectureError, CheckpointError, LeangridError, first_line
from leangrid.formats import schemes_of
from leangrid.layers import PackedLinear
from leangrid.models.tokenizer import load_tokenizer
from leangrid.storage.config import read_config


def load(
    directory: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None, dense: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Open a result of ``leangrid.quantize`` (or a plain checkpoint) for inference. Nothing is downloaded and no code of it runs.

    Args:
        directory: holds config.json, safetensors and usually a tokenizer.
        device: where the model goes.
        dtype: of its floating-point tensors; None: as stored.
        dense: dequantize every packed layer once into a plain nn.Linear. Same numbers, 16 or 32 bits a weight of memory, no
            dequantization in each forward pass.

    Returns:
        The model in evaluation mode and its tokenizer (None where the directory has none).

    Raises:
        CheckpointError: a file is missing, damaged or not what the config says.
        ArchitectureError: the model class is not one of transformers'.
        FormatError: a quantization that leangrid does not read.
    """
    directory = Path(directory)
    stored = _read_config(directory)
    model_class = _model_class(stored)
    read_config(directory / "config.json")  # refuses sizes that no model has before transformers allocates by them
    with _transformers_errors(directory):
        config = transformers.CONFIG_MAPPING[stored["model_type"]].from_dict(
            {k: v for k, v in stored.items() if k != "quantization_config"}
        )
    quantization = stored.get("quantization_config")
    if quantization is not None:
        schemes_of(quantization, ())  # refused here, by name, before transformers sees it
        config.quantization_config = hf_quantizer.through_leangrid(quantization, stored.get("dtype") or stored.get("torch_dtype"))
    model = _from_pretrained(model_class, directory, config, dtype)
    if dense:
        _to_dense(model)
    return model.to(device).eval(), load_tokenizer(directory)  # pyright: ignore[reportArgumentType]


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    if not path.is_file():
        unfinished = directory.name.endswith(".partial") or directory.with_name(directory.name + ".partial").is_dir()
        resume = "The run is not finished: give the same quantize command again"
        raise CheckpointError("there is no config.json", directory, resume if unfinished else "Give the directory of a finished result")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"config.json cannot be read: {error}", path, "Copy the directory again") from error
    if not isinstance(config, dict) or not isinstance(config.get("quantization_config", {}), dict):
        raise CheckpointError("config.json is not an object", path, "Copy the directory again")
    return config


def _model_class(config: dict[str, Any]) -> type[PreTrainedModel]:
    """The class that ``architectures`` names, if transformers has it; never code from the checkpoint."""
    if config.get("auto_map"):
        raise ArchitectureError("the checkpoint brings its own code, which leangrid never runs", "config.json: auto_map", "Remove auto_map")
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    found = getattr(transformers, name, None) if isinstance(name, str) and config.get("model_type") in transformers.CONFIG_MAPPING else None
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        what = f"transformers {transformers.__version__} has no model {name!r} of type {config.get('model_type')!r}"
        raise ArchitectureError(what, "config.json: architectures, model_type", "Upgrade transformers, or mend config.json")
    return found


@contextmanager
def _transformers_errors(directory: Path) -> Iterator[None]:
    """Whatever a damaged file makes of transformers' classes is one sentence; nobody can list the exceptions."""
    try:
        yield
    except (LeangridError, MemoryError):
        raise
    except Exception as error:
        way_out = "Compare it with its manifest: leangrid verify DIR"
        raise CheckpointError(f"transformers cannot load it: {first_line(error)}", directory, way_out) from error


def _from_pretrained(model_class: type[PreTrainedModel], directory: Path, config: Any, dtype: torch.dtype | None) -> PreTrainedModel:
    with _transformers_errors(directory):
        loaded: Any = model_class.from_pretrained(
            directory, config=config, dtype=dtype or "auto", local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    model, info = loaded
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if missing:
        raise CheckpointError(f"{len(missing)} tensors are missing", f"first: {missing[0]}", "Copy or quantize the directory again")
    if unexpected:
        warnings.warn(f"{directory}: {len(unexpected)} tensors are not part of {model_class.__name__}, first {unexpected[0]}", stacklevel=3)
    return model


def _to_dense(model: nn.Module) -> None:
    for name, layer in list(model.named_modules()):
        if isinstance(layer, PackedLinear):
            linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            linear.weight = nn.Parameter(layer.weight_hat, requires_grad=False)
            linear.register_parameter("bias", layer.bias)
            model.set_submodule(name, linear)

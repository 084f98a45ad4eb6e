"""Opening a quantized directory as a transformers model that runs on packed layers."""

import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from leangrid.errors import ArchitectureError, CheckpointError, LeangridError, first_line
from leangrid.formats import schemes_of
from leangrid.inference import transformers_quantizer
from leangrid.inference.layers import PackedLinear
from leangrid.machine.devices import parse_device
from leangrid.models.gguf import dequantize, is_gguf
from leangrid.models.model_class import class_named, config_of
from leangrid.models.original import open_original
from leangrid.models.skeleton import Skeleton
from leangrid.models.tokenizer import load_tokenizer
from leangrid.storage.config import read_config
from leangrid.storage.dequantize import DequantizedInfo
from leangrid.storage.hub import locate_source
from leangrid.storage.manifest import is_result
from leangrid.storage.quantized_source import is_only_dequantized
from leangrid.storage.side_files import refuse_pointers
from leangrid.storage.source import open_source


def load(
    directory: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None, dense: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Open a result of ``leangrid.quantize``, or a source that ``quantize`` accepts, for inference. No code in it runs.

    Args:
        directory: a result (config.json, safetensors, usually a tokenizer), a checkpoint directory, a hub id
            ``org/name[@revision]``, or a .gguf file, which is dequantized into a temporary directory.
        device: where the model is put.
        dtype: of its floating-point tensors; None: as they are stored.
        dense: dequantize every packed layer once into an nn.Linear: the same numbers, with 16 or 32 bits of memory a
            weight and without dequantizing in each forward pass.

    Returns:
        The model in evaluation mode, and its tokenizer (None where the directory has none).

    Raises:
        CheckpointError: a file is missing, damaged or not what the config says.
        ArchitectureError: transformers has no such model class.
        FormatError: leangrid does not read this quantization.

    Example:
        >>> model, tokenizer = leangrid.load("out")
        >>> inputs = tokenizer("A sentence.", return_tensors="pt")
        >>> model(input_ids=inputs.input_ids).logits.shape[-1]
        512
    """
    parse_device(str(device))
    _refuse_unfinished(Path(directory))
    path = locate_source(str(directory))
    if is_gguf(path):
        with tempfile.TemporaryDirectory(prefix="leangrid-") as folder:
            dequantize(path, Path(folder) / "model")
            return load(Path(folder) / "model", device, dtype, dense)
    stored = read_config(path / "config.json")  # refuses sizes that no model has before transformers allocates by them
    if not isinstance(stored.get("quantization_config") or {}, dict):
        where = f"{path / 'config.json'}: quantization_config"
        raise CheckpointError("quantization_config is not an object", where, "Copy the directory again")
    refuse_pointers(path)
    entry = stored.get("quantization_config")
    plain = not entry or is_only_dequantized(entry) or _is_packed_with_holes(path, entry)
    model = _dense_checkpoint(path, dtype) if plain else _packed(path, stored, dtype)
    if dense:
        _to_dense(model)
    return model.to(device).eval(), load_tokenizer(path)  # pyright: ignore[reportArgumentType]


def _dense_checkpoint(directory: Path, dtype: torch.dtype | None) -> PreTrainedModel:
    """A plain checkpoint, checked as ``quantize`` does and opened by transformers."""
    with open_source(directory) as checkpoint:
        skeleton = Skeleton(checkpoint)
        return open_original(checkpoint, type(skeleton.model), dtype=dtype, absent=skeleton.naming.absent)[0]


def _is_packed_with_holes(directory: Path, entry: dict[str, Any]) -> bool:
    """Whether integers are packed as compressed-tensors 0.17 and older did, which no packed layer reads."""
    groups = entry.get("config_groups") or {}
    bits = {str((group.get("weights") or {}).get("num_bits")) for group in groups.values() if isinstance(group, dict)}
    if is_result(directory) or bits <= {"1", "2", "4", "8"}:
        return False
    try:
        with open_source(directory) as checkpoint:
            found = [info for info in checkpoint.tensors.values() if isinstance(info, DequantizedInfo)]
    except LeangridError:  # packed layers say what is wrong in their own words
        return False
    return any(info.layout.holes for info in found)


def _packed(directory: Path, stored: dict[str, Any], dtype: torch.dtype | None) -> PreTrainedModel:
    """A quantized directory, on packed layers."""
    model_class, quantization = _model_class(stored), stored["quantization_config"]
    with _transformers_errors(directory):
        config = config_of({k: v for k, v in stored.items() if k != "quantization_config"})
    schemes_of(quantization, ())  # refuses what leangrid does not read, before transformers does
    config.quantization_config = transformers_quantizer.route_to_leangrid(
        quantization, stored.get("dtype") or stored.get("torch_dtype")
    )
    return _from_pretrained(model_class, directory, config, dtype)


def _refuse_unfinished(directory: Path) -> None:
    """CheckpointError where a run has begun to make ``directory`` and is not finished."""
    places = (directory.with_name(directory.name + ".partial"), directory / ".partial") if directory.name else ()
    begun = directory.name.endswith(".partial") or any(place.is_dir() for place in places)
    if begun and not (directory / "config.json").is_file():
        raise CheckpointError(
            "the run that makes it is not finished", directory, "Give the same quantize command again"
        )


def _model_class(config: dict[str, Any]) -> type[PreTrainedModel]:
    """The class of transformers that ``architectures`` names; never code from the checkpoint."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    kind = config.get("model_type")
    found = None
    if isinstance(name, str) and isinstance(kind, str) and kind in transformers.CONFIG_MAPPING:
        found = class_named(name, transformers.CONFIG_MAPPING[kind])
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        what = f"transformers {transformers.__version__} has no model {name!r} of type {config.get('model_type')!r}"
        raise ArchitectureError(
            what, "config.json: architectures, model_type", "Upgrade transformers, or mend config.json"
        )
    return found


@contextmanager
def _transformers_errors(directory: Path) -> Iterator[None]:
    """Turn whatever transformers raises for a damaged file, which nobody can list, into one CheckpointError."""
    try:
        yield
    except (LeangridError, MemoryError):
        raise
    except Exception as error:
        way_out = "Compare it with its manifest: leangrid verify DIR"
        raise CheckpointError(f"transformers cannot load it: {first_line(error)}", directory, way_out) from error


def _from_pretrained(
    model_class: type[PreTrainedModel], directory: Path, config: Any, dtype: torch.dtype | None
) -> PreTrainedModel:
    with _transformers_errors(directory):
        loaded: Any = model_class.from_pretrained(
            directory,
            config=config,
            dtype=dtype or "auto",
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    model, info = loaded
    modules = {path for path, _ in model.named_modules()}
    missing = sorted(info["missing_keys"])
    # What lies beside the model (Naming.extra) was said when the result was made; one tensor more of its own modules
    # was not.
    unexpected = sorted(name for name in info["unexpected_keys"] if name.rpartition(".")[0] in modules)
    if missing:
        raise CheckpointError(
            f"{len(missing)} tensors are missing", f"first: {missing[0]}", "Copy or quantize the directory again"
        )
    if unexpected:
        warnings.warn(
            f"{directory}: {len(unexpected)} tensors are not part of {model_class.__name__}, first {unexpected[0]}",
            stacklevel=3,
        )
    return model


def _to_dense(model: nn.Module) -> None:
    for name, layer in list(model.named_modules()):
        if isinstance(layer, PackedLinear):
            linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            linear.weight = nn.Parameter(layer.weight_hat, requires_grad=False)
            linear.register_parameter("bias", layer.bias)
            model.set_submodule(name, linear)

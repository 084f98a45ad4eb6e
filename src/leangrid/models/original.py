"""A checkpoint as transformers itself opens it, with which our own reading of it is compared.

Nothing is downloaded and no code of the checkpoint runs. transformers is given a temporary directory of links where it
would not find weights that ``storage/source.py`` accepts (an index without ``metadata``, a single file of another name)
or would load more than the weights (an adapter beside them)."""

import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import align_module_device
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from leangrid.errors import CheckpointError, LeangridError, first_line
from leangrid.machine.devices import is_out_of_memory
from leangrid.models.dequantized import is_dequantized, lazy_state_dict
from leangrid.models.naming import Weights
from leangrid.storage import files
from leangrid.storage.safetensors import parse_strict_json
from leangrid.storage.source import Checkpoint

_SINGLE, _INDEX, _GENERATION = "model.safetensors", "model.safetensors.index.json", "generation_config.json"
_MISREAD = ("adapter_config.json",)  # files that make transformers load something other than these weights


def open_original(
    checkpoint: Weights,
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig | None = None,
    dtype: torch.dtype | None = None,
    absent: Sequence[str] = (),
) -> tuple[PreTrainedModel, list[str]]:
    """Open a dense checkpoint by transformers' own ``from_pretrained``.

    A source in fewer bits than 16 is dequantized by us, tensor by tensor as transformers asks for it.

    Args:
        checkpoint: an opened source that lies in a directory.
        model_class: a class of transformers itself.
        config: None is config.json as transformers reads it.
        dtype: the dtype of the floating-point parameters; None is the stored one.
        absent: modules of which the checkpoint holds no tensor (Naming.absent); transformers gives them random weights.

    Returns:
        the model in memory, in evaluation mode on the CPU, and the names of stored tensors that it does not have.

    Raises:
        CheckpointError: transformers cannot open it, or finds a tensor of the model in no file.
    """
    if is_dequantized(checkpoint):
        return _open(checkpoint.directory, checkpoint, model_class, config, dtype, absent)
    with _readable(checkpoint) as where:
        return _open(checkpoint.directory, where, model_class, config, dtype, absent)


@contextmanager
def original_on_disk(
    checkpoint: Weights,
    model_class: type[PreTrainedModel],
    dtype: torch.dtype,
    absent: Sequence[str] = (),
    device: torch.device | str = "cpu",
) -> Iterator[PreTrainedModel]:
    """Context: the model of ``open_original`` computing on ``device``, its weights left in their files. Each is read
    whenever its module computes, so that memory holds one module at a time, and tied weights.

    Not for experts that transformers fuses into one tensor, since it would write them all to disk, and not for a source
    in fewer bits than 16.
    """
    with _readable(checkpoint) as where:
        config = _config(checkpoint.directory, model_class)
        yield _open(
            checkpoint.directory, where, model_class, config, dtype, absent, _map(model_class, config, absent, device)
        )[0]


def _open(
    directory: Path,
    where: Path | Checkpoint,
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig | None,
    dtype: torch.dtype | None,
    absent: Sequence[str],
    placed: dict[str, str] | None = None,
) -> tuple[PreTrainedModel, list[str]]:
    lazily = isinstance(where, Checkpoint)
    try:
        with quiet():
            loaded: Any = model_class.from_pretrained(
                None if lazily else where,
                state_dict=lazy_state_dict(where) if lazily else None,
                config=config or (_plain_config(where, model_class) if lazily else _config(directory, model_class)),
                dtype=dtype or "auto",
                device_map=placed,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except (LeangridError, MemoryError):
        raise
    except Exception as error:  # any file may raise anything inside of transformers
        if is_out_of_memory(error):
            raise
        raise CheckpointError(
            f"transformers cannot load it: {first_line(error)}", directory, "Check the download"
        ) from error
    model, info = loaded
    missing = sorted(name for name in info["missing_keys"] if not set(name.split(".")) & set(absent))
    if missing:
        what = f"transformers finds {len(missing)} tensors of {model_class.__name__} in no file, first {missing[0]}"
        raise CheckpointError(what, directory, "Download or copy the directory again")
    return model.eval(), sorted(info["unexpected_keys"])


def tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter and buffer with its name, tied ones under each of their names; those left in files are read
    one module at a time."""
    for path, module in model.named_modules(remove_duplicate=False):
        dot = f"{path}." if path else ""
        with align_module_device(module, torch.device("cpu")):
            for own in (module.named_parameters(recurse=False), module.named_buffers(recurse=False)):
                yield from ((dot + name, tensor) for name, tensor in own)


@contextmanager
def quiet() -> Iterator[None]:
    """Context: transformers and accelerate print no warnings and no progress bars."""
    bars, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    placing = logging.getLogger("accelerate.big_modeling")
    before = placing.level
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    placing.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        placing.setLevel(before)
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _config(directory: Path, model_class: type[PreTrainedModel]) -> PreTrainedConfig:
    kind: Any = model_class.config_class
    return kind.from_pretrained(directory, local_files_only=True, trust_remote_code=False)


def _plain_config(checkpoint: Checkpoint, model_class: type[PreTrainedModel]) -> PreTrainedConfig:
    """As ``_config``, without the entry that says that the weights are quantized."""
    kind: Any = model_class.config_class
    return kind.from_dict(deepcopy(checkpoint.config))


def _map(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, absent: Sequence[str], device: torch.device | str
) -> dict[str, str]:
    """A device map that leaves weights on disk, except those that are in no file, and tied ones, which transformers
    cannot compare on disk. accelerate needs at least one module that is not on disk: the smallest."""
    with torch.device("meta"):
        empty = model_class(config)
    tied = getattr(empty, "all_tied_weights_keys", None) or {}
    names = {name for pair in tied.items() for name in pair}
    names |= {name for name, _ in empty.named_parameters() if set(name.split(".")) & set(absent)}
    # accelerate places whole modules: the sizes of the outermost ones with parameters of their own.
    sizes: dict[str, int] = {}
    for path, module in empty.named_modules():
        own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        if own and not any(path.startswith(f"{outer}.") for outer in sizes):
            sizes[path] = sum(parameter.numel() for parameter in module.parameters())
    here = {path for path in sizes if any(name.startswith(f"{path}.") for name in names)} | {
        min(sizes, key=lambda path: sizes[path])
    }
    return {path: str(device) if path in here else "disk" for path in sizes}


@contextmanager
def _readable(checkpoint: Weights) -> Iterator[Path]:
    """Context: the checkpoint's directory where transformers finds the weights in it, else a temporary one with links
    to them under the names it looks for."""
    directory = checkpoint.directory
    if _found(directory) and not any((directory / name).exists() for name in _MISREAD):
        yield directory
        return
    shards = sorted({Path(info.file) for info in checkpoint.tensors.values()})
    with tempfile.TemporaryDirectory(prefix="leangrid-") as folder:
        view = Path(folder)
        if len(shards) == 1:
            files.make_link(view / _SINGLE, shards[0])
        else:
            owners = {name: shard.name for shard in shards for name in _names(shard)}
            files.write_json(view / _INDEX, {"metadata": {}, "weight_map": owners})
            for shard in shards:
                files.make_link(view / shard.name, shard)
        if (directory / _GENERATION).is_file():
            files.make_link(view / _GENERATION, directory / _GENERATION)
        yield view


def _found(directory: Path) -> bool:
    """Whether transformers finds weights here: a single file of the usual name, or an index with metadata."""
    if (directory / _SINGLE).is_file():
        return True
    index = directory / _INDEX
    return index.is_file() and isinstance(parse_strict_json(index.read_bytes(), index).get("metadata"), dict)


def _names(shard: Path) -> list[str]:
    with safe_open(shard, framework="pt") as opened:
        return list(opened.keys())

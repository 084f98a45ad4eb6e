"""Whether mlx-lm opens a result in MLX's container: asked of its own code where it is installed, before any weight is
read.

mlx-lm has a class for each architecture, which renames, merges and cuts the tensors of a checkpoint. Some of them
merge experts that are packed one by one, most only dense ones. Arrays of mlx are made when they are looked at: here
nobody does, so that a model of any size costs names and shapes."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

_UTILS = "mlx_lm.utils"  # no dependency of ours
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "U32": "uint32", "I32": "int32", "I64": "int64"}


def is_installed() -> bool:
    """Whether there is an mlx-lm to ask, with the function by which it finds a model's class."""
    try:
        import_module(_UTILS)._get_classes  # noqa: B018
    except (ImportError, AttributeError):
        return False
    return True


def find_obstacle(config: dict[str, Any], tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> str | None:
    """Why mlx-lm does not open a checkpoint, as a clause; None where it does.

    Args:
        config: its config.json, with MLX's entry under ``quantization``.
        tensors: name -> (dtype as safetensors spells it, shape) of every tensor in its files.
    """
    import mlx.core as mx
    import mlx.nn as nn

    weights = {
        name: mx.zeros(shape, dtype=getattr(mx, _DTYPES.get(dtype, "float32")))
        for name, (dtype, shape) in tensors.items()
    }
    entry = config["quantization"]
    try:
        kind, arguments = import_module(_UTILS)._get_classes(config=config)
        model = kind(arguments.from_dict(config))
        weights = model.sanitize(weights) if hasattr(model, "sanitize") else weights
        packed = lambda path, module: entry.get(path, hasattr(module, "to_quantized") and f"{path}.scales" in weights)  # noqa: E731
        nn.quantize(model, group_size=entry["group_size"], bits=entry["bits"], class_predicate=packed)
        model.load_weights(list(weights.items()), strict=True)
    except Exception as error:  # whatever the class of an architecture stumbles over
        return " ".join(f"{type(error).__name__}: {error}".split())[:160]
    return None

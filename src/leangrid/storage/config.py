"""Reads config.json of a checkpoint and checks its sizes, before anything is allocated according to them."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from leangrid.errors import CheckpointError
from leangrid.storage.foreign import refuse_adapter
from leangrid.storage.safetensors import parse_strict_json

_MAX_BYTES = 16 << 20

# Largest value that a size may have, about a hundred times the largest of real models.
_LIMITS: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "embedding_size", "head_dim"), 1 << 20),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "moe_intermediate_size", "d_ff"), 1 << 24),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers"), 10_000),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_key_value_heads", "num_heads"), 1 << 16),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 1 << 16),
    **dict.fromkeys(("vocab_size", "type_vocab_size"), 1 << 26),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 1 << 31),
}
# A dense model of a type with experts, such as Granite 4's small ones, has none; GLM 5 says its heads' size in another
# field.
_MAY_BE_ZERO = ("type_vocab_size", "head_dim", "num_local_experts", "num_experts", "n_routed_experts",
                "moe_intermediate_size")  # fmt: skip
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
_POSITIVE = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "initializer_range", "initializer_factor")
_ROPES = ("rope_scaling.", "rope_parameters.")
_FACTORS = ("factor", "low_freq_factor", "high_freq_factor", "partial_rotary_factor")  # of a rotary embedding


def read_config(path: Path) -> dict[str, Any]:
    """Parse the config.json at ``path`` and check the range of its sizes.

    Raises CheckpointError if there is none, it cannot be read, it is no JSON object, or it holds values that no model
    has; these are listed."""
    try:
        if not path.is_file():
            refuse_adapter(path.parent)
            raise CheckpointError("there is no config.json", path.parent, _instead(path.parent))
        if path.stat().st_size > _MAX_BYTES:
            raise CheckpointError(f"config.json has {path.stat().st_size} bytes; {_MAX_BYTES} are allowed", path)
        raw = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"cannot read: {error.strerror or error}", path, "Check the file's permissions and the disk"
        ) from error
    config = parse_strict_json(raw, path, allow_infinity=True)
    if not isinstance(config, dict):
        raise CheckpointError("config.json is not a JSON object", path)
    problems = list(_list_absurd_values(config, ""))
    if problems:
        raise CheckpointError(
            "config.json holds values no model has: " + "; ".join(problems[:8]), path, "Download the checkpoint again"
        )
    return config


def _instead(directory: Path) -> str:
    """What the user can do about a directory without a config.json, judging by its files."""
    names = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []
    if files := [name for name in names if name.lower().endswith(".gguf")]:
        return f"Give the .gguf file itself: {directory / files[0]}"
    if "params.json" in names:
        return "These are weights in Meta's or Mistral's own format: convert them to Hugging Face's first"
    if inside := [name for name in names if (directory / name / "config.json").is_file()]:
        return f"Give the directory that holds it: {directory / inside[0]}"
    return "Give the directory of a Hugging Face checkpoint"


def check_layer_count(config: dict[str, Any], tensors: int, path: Path) -> None:
    """Raise CheckpointError if the config announces more layers than the checkpoint has ``tensors``."""
    for section in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in _LAYERS:
            if isinstance(section.get(key), int) and section[key] > tensors:
                raise CheckpointError(
                    f"config.json announces {key} = {section[key]}, the checkpoint holds only {tensors} tensors", path
                )


def find_custom_code(config: dict[str, Any]) -> tuple[str, ...]:
    """The names under which a config refers to Python code of its own (``auto_map``), at any depth. It is never run."""
    found: list[str] = []
    for key, value in config.items():
        if key == "auto_map":
            found += sorted(map(str, value)) if isinstance(value, dict) else [str(value)]
        elif isinstance(value, dict):
            found += find_custom_code(value)
    return tuple(found)


def add_older_rope_keys(config: dict[str, Any]) -> dict[str, Any]:
    """``config`` with its rotary embedding also under the keys that transformers 4 and readers such as mlx-lm use.

    Without these keys such readers silently use their defaults: another base, and no scaling for long contexts. Keys
    that the config has already keep their values."""
    ropes = config.get("rope_parameters")
    if not isinstance(ropes, dict):
        return config
    # Gemma 3 has one entry for each kind of attention.
    by_layer = bool(ropes) and all(isinstance(rope, dict) for rope in ropes.values())
    if by_layer and any(_is_more_than_a_base(rope) for rope in ropes.values()):
        return config  # the older keys hold a base for each of two kinds, and would replace the rest
    rope = ropes.get("full_attention", {}) if by_layer else ropes
    older: dict[str, Any] = {"rope_theta": rope.get("rope_theta")}
    if by_layer:
        older["rope_local_base_freq"] = ropes.get("sliding_attention", {}).get("rope_theta")
    if rope.get("rope_type", "default") != "default":
        older["rope_scaling"] = rope
    present = {key: value for key, value in config.items() if value is not None or key not in older}
    return {key: value for key, value in older.items() if value is not None} | present


def _is_more_than_a_base(rope: dict[str, Any]) -> bool:
    return bool(rope.keys() - {"rope_theta", "rope_type", "factor"})


def _list_absurd_values(section: dict[str, Any], prefix: str) -> Iterator[str]:
    """Yield one phrase for each value outside of its range, with the range; ``prefix`` is the path to ``section``."""
    for key, value in section.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and prefix.count(".") < 8:
            yield from _list_absurd_values(value, f"{name}.")
        elif key in _LIMITS and value is not None:
            # Some families, such as OpenELM, give a list with one size for each layer.
            for item in value if isinstance(value, list) else [value]:
                least = 0 if key in _MAY_BE_ZERO else 1
                if type(item) is not int or not least <= item <= _LIMITS[key]:
                    yield f"{name} = {str(item)[:40]} (a whole number from {least} to {_LIMITS[key]})"
        elif key in _POSITIVE and value is not None and not _is_finite_and_not_negative(value):
            yield f"{name} = {str(value)[:40]} (a finite number, not negative)"
        elif (
            (key == "rope_theta" or (key in _FACTORS and prefix.startswith(_ROPES)))
            and value is not None
            and not (_is_finite_and_not_negative(value) and value != 0)
        ):
            yield f"{name} = {str(value)[:40]} (a finite number above 0)"


def _is_finite_and_not_negative(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0

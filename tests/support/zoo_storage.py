"""The ways in which checkpoints of one model are stored: in 16 bits, over several files, with the config of an older
transformers. A directory that transformers wrote is written again in another of them."""

import json
import random
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


class Storage(NamedTuple):
    """How a source is stored.

    Attributes:
        halved: in bfloat16.
        shards: in how many files, with an index; 1: without.
        older: rotary tables and the type of numbers under the names of transformers 4.
        bare: under the names of the model without its head, where the head has no tensor of its own.
    """

    halved: bool = False
    shards: int = 1
    older: bool = False
    bare: bool = False

    @classmethod
    def drawn(cls, model_type: str, seed: int) -> "Storage":
        """A way of its own for each seed."""
        draw = random.Random(f"{seed} {model_type} storage")
        return cls(draw.random() < 0.5, draw.choice([1, 3]), draw.random() < 0.5, draw.random() < 0.5)

    def words(self) -> list[str]:
        """What differs from how transformers writes a float32 model."""
        said = {"bfloat16": self.halved, f"{self.shards} files": self.shards > 1, "older config": self.older,
                "bare names": self.bare}  # fmt: skip
        return [words for words, true in said.items() if true]


@torch.no_grad()
def round_stored(model: nn.Module) -> None:
    """Give a model the numbers that its checkpoint in bfloat16 holds, still in float32."""
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.bfloat16())


def store_as(directory: Path, way: Storage) -> None:
    """Write the checkpoint in ``directory`` again, another ``way``."""
    tensors: dict[str, Tensor] = {}
    for file in directory.glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if way.bare:
        tensors = _without_prefix(tensors, config)
    if way.halved:
        tensors = {name: x.bfloat16() if x.is_floating_point() else x for name, x in tensors.items()}
    _write(tensors, directory, way.shards)
    if way.halved:
        config = _with_dtype(config)
    path.write_text(json.dumps(_older(config) if way.older else config, indent=2), encoding="utf-8")


def _write(tensors: dict[str, Tensor], directory: Path, shards: int) -> None:
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        return
    files = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in sorted(set(files.values())):
        own = {name: tensors[name] for name in files if files[name] == file}
        save_file(own, directory / file, {"format": "pt"})
    size = sum(x.numel() * x.element_size() for x in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": files}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _without_prefix(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    (architecture,) = config["architectures"]
    prefix = f"{getattr(transformers, architecture).base_model_prefix}."
    whole = all(name.startswith(prefix) for name in tensors)
    return {name.removeprefix(prefix): x for name, x in tensors.items()} if whole else tensors


def _with_dtype(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {k: "bfloat16" if k == "dtype" and v == "float32" else _with_dtype(v) for k, v in value.items()}


def _older(value: Any) -> Any:
    """A config as transformers 4 wrote it."""
    if not isinstance(value, dict):
        return value
    fields = {k: _older(v) for k, v in value.items()}
    if isinstance(fields.get("dtype"), str):
        fields["torch_dtype"] = fields.pop("dtype")
    rope = fields.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope and not any(isinstance(v, dict) for v in rope.values()):
        scaling = dict(fields.pop("rope_parameters"))
        fields["rope_theta"] = scaling.pop("rope_theta")
        if "partial_rotary_factor" in scaling:
            fields["partial_rotary_factor"] = scaling.pop("partial_rotary_factor")
        fields["rope_scaling"] = scaling if scaling.get("rope_type") != "default" or len(scaling) > 1 else None
    return fields

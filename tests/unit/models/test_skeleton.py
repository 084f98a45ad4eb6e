"""The skeleton: shapes from the config, tensors from disk, every disagreement listed."""

import json
from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file

from leangrid.errors import ArchitectureError, CheckpointError
from leangrid.machine.memory import _status
from leangrid.models.linears import LINEARS
from leangrid.models.shapes import describe_shape
from leangrid.models.skeleton import Skeleton
from leangrid.storage.source import open_source


def _edit_config(directory: Path, **fields: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_every_linear_of_the_blocks_is_found(name: str, tmp_path: Path) -> None:
    skeleton = Skeleton(open_source(tiny_models.save(name, tmp_path)))
    for index, block in enumerate(skeleton.blocks):
        in_block = {n for n, m in block.named_modules() if isinstance(m, LINEARS)}
        assert in_block == {n for group in skeleton.groups(index) for n in group}
    assert not skeleton.kept and not skeleton.structure.flows


@pytest.mark.parametrize("sharded", [False, True])
def test_materialised_block_holds_the_checkpoint(sharded: bool, tmp_path: Path) -> None:
    skeleton = Skeleton(open_source(tiny_models.save("qwen2", tmp_path, sharded=sharded)))
    model = tiny_models.build("qwen2")
    with skeleton.load_block(1) as block:
        for name, parameter in block.named_parameters():
            assert torch.equal(parameter, model.get_parameter(f"{skeleton.block_name(1)}.{name}")), name


def test_a_skeleton_allocates_no_weights_on_its_way(tmp_path: Path) -> None:
    """Not even addresses: a limit on a process's memory counts those."""
    described = describe_shape("llama-2-7b")
    before = _status("VmData:")
    Skeleton(described)
    assert _status("VmData:") - before < 1 << 30


def test_a_headless_checkpoint_may_lack_the_base_prefix(tmp_path: Path) -> None:
    tiny_models.save("gpt2", tmp_path)
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(tmp_path / "model.safetensors").items()}
    save_file(tensors, tmp_path / "model.safetensors")
    skeleton = Skeleton(open_source(tmp_path))
    assert torch.equal(skeleton.read("transformer.h.0.attn.c_attn.weight"), tensors["h.0.attn.c_attn.weight"])


@pytest.mark.fault("S9")
def test_unknown_architecture_is_refused_by_name(tmp_path: Path) -> None:
    tiny_models.save("llama2", tmp_path)
    _edit_config(tmp_path, model_type="walrus")
    with pytest.raises(ArchitectureError, match=r"'walrus' is not known to transformers .*Upgrade transformers"):
        Skeleton(open_source(tmp_path))


@pytest.mark.fault("S6")
def test_custom_code_is_never_run(tmp_path: Path) -> None:
    tiny_models.save("llama2", tmp_path)
    canary = tmp_path / "canary"
    (tmp_path / "modeling_evil.py").write_text(f"open({str(canary)!r}, 'w')\n")
    _edit_config(tmp_path, auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    Skeleton(open_source(tmp_path))
    _edit_config(tmp_path, model_type="evil")
    with pytest.raises(ArchitectureError):
        Skeleton(open_source(tmp_path))
    assert not canary.exists()


@pytest.mark.fault("S7")
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"num_hidden_layers": 3}, "model.layers.2.* is missing"),
        ({"num_hidden_layers": 1}, "model.layers.1.* is not part of the model"),
        ({"intermediate_size": 96}, "has shape"),
        ({"vocab_size": 500}, "has shape"),
        ({"num_key_value_heads": 4}, "has shape"),
    ],
)
def test_config_that_lies_is_refused_with_the_differences(
    fields: dict[str, int], expected: str, tmp_path: Path
) -> None:
    tiny_models.save("llama2", tmp_path)
    _edit_config(tmp_path, **fields)
    with pytest.raises(CheckpointError, match=expected):
        Skeleton(open_source(tmp_path))


@pytest.mark.fault("S7")
def test_missing_and_extra_tensors_are_refused(tmp_path: Path) -> None:
    tiny_models.save("llama2", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.extra.weight"] = tensors.pop("model.layers.0.mlp.up_proj.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"up_proj\.weight is missing.*extra\.weight is not part of the model"):
        Skeleton(open_source(tmp_path))

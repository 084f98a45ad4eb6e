"""Under which names a result holds what: the source's, and the module's where transformers finds no other."""

from pathlib import Path

import pytest
import torch
import zoo_models
from described_tensors import Shaped

from leangrid.models.model_class import described_model
from leangrid.models.skeleton import Skeleton
from leangrid.models.stored import merged_mixtures
from leangrid.storage.source import Checkpoint, open_source


def skeleton_of(kind: str, family: str, directory: Path) -> Skeleton:
    return Skeleton(open_source(zoo_models.save(zoo_models.build(kind, family), directory / kind)))


def plain_names(skeleton: Skeleton) -> set[str]:
    return {name for index in (None, *range(len(skeleton.blocks))) for name, *_ in skeleton.plain_tensors(index)}


@pytest.mark.parametrize(("kind", "family"), [("gemma3", "image-text"), ("mixtral", "causal"), ("gpt2", "causal")])
def test_the_result_has_the_sources_names(kind: str, family: str, tmp_path: Path) -> None:
    skeleton = skeleton_of(kind, family, tmp_path)
    quantized = {f"{name}.weight" for name in skeleton.all_linear_names()}
    assert quantized | plain_names(skeleton) == set(skeleton.checkpoint.tensors)
    assert not quantized & plain_names(skeleton) and not skeleton.stored.not_found


def test_projections_that_are_cut_apart_have_their_modules_names(tmp_path: Path) -> None:
    skeleton = skeleton_of("hrm_text", "causal", tmp_path)
    for name in skeleton.all_linear_names():
        assert f"{name}.weight" in skeleton.checkpoint.tensors or skeleton.path(name) == name
    assert "model.H_module.layers.0.mlp.up_proj" in skeleton.all_linear_names()
    assert not [name for name in plain_names(skeleton) if "gate_up_proj" in name]  # all of it is quantized


def test_what_a_converter_merges_is_kept_as_the_module_has_it(tmp_path: Path) -> None:
    skeleton = skeleton_of("kimi_linear", "causal", tmp_path)
    source = skeleton.checkpoint
    assert isinstance(source, Checkpoint)
    convolution = next(name for name in plain_names(skeleton) if name.endswith("conv1d.weight"))
    assert convolution not in skeleton.checkpoint.tensors and skeleton.stored.places[convolution].converted
    assert tuple(skeleton.read(convolution).shape) == tuple(skeleton.model.get_parameter(convolution).shape)
    source.close()


def test_experts_in_one_tensor_are_named_by_its_path(tmp_path: Path) -> None:
    skeleton = skeleton_of("llama4", "image-text", tmp_path)
    stored = next(name for name in skeleton.checkpoint.tensors if name.endswith("experts.down_proj"))
    assert f"{stored.removesuffix('down_proj')}0.down_proj" in skeleton.all_linear_names()


MERGED = ("gate_up_proj", "down_proj")


@pytest.mark.parametrize(
    ("kind", "family", "as_stored"),
    [
        ("mixtral", "causal", False),
        ("gpt_oss", "causal", True),
        ("granitemoe", "causal", True),
        ("llama4", "image-text", None),
    ],
)
def test_experts_that_all_stay_are_held_as_plain_transformers_finds_them(
    kind: str, family: str, as_stored: bool | None, tmp_path: Path
) -> None:
    """In the tensors of all experts: the source's own where it has them, else its model's. Llama 4's experts, which
    transformers takes apart as it opens a quantized result, stay apart."""
    skeleton = skeleton_of(kind, family, tmp_path)
    path = next(iter(skeleton.expert_forms))
    fused = {f"{path}.{name}" for name in skeleton.expert_forms[path].fused_names}
    one_by_one, merged = (skeleton.stored.kept_whole(path, merge) for merge in (False, True))
    if as_stored is None:
        assert merged is None and one_by_one is None
        return
    assert merged is not None and {own for _, own in merged} == fused
    if as_stored:
        assert merged == one_by_one and {name for name, _ in merged} <= set(skeleton.checkpoint.tensors)
    else:
        assert one_by_one is None and {name for name, _ in merged} == fused
    plain = zoo_models.build(kind, family)
    for _, own in merged:
        assert own is not None and torch.equal(skeleton.read(own), plain.get_parameter(own))


def test_mixtures_stored_in_tensors_of_all_experts(tmp_path: Path) -> None:
    skeleton = skeleton_of("mixtral", "causal", tmp_path)
    first, second = skeleton.expert_forms
    model = described_model(skeleton.checkpoint.config)
    stored = {name: one for name, one in skeleton.checkpoint.tensors.items() if ".layers.0." not in name}
    assert not merged_mixtures(model, stored)
    stored |= {f"{first}.{leaf}": Shaped((4, 2, 2), "F32") for leaf in MERGED}
    assert merged_mixtures(model, stored) == {first} != {second}
    del stored[f"{first}.down_proj"]
    assert not merged_mixtures(model, stored)

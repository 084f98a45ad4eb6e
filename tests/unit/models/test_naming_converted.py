"""Matching where the checkpoint's names and layouts are not the model's: what is converted, what lies beside, what is
refused, before a weight is read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zoo_models
from described_tensors import described, empty, saved

from leangrid.errors import CheckpointError
from leangrid.models.naming import Naming, match_names
from leangrid.models.shapes import DescribedCheckpoint, TensorShape

Stored = dict[str, TensorShape]


@pytest.fixture
def match(tmp_path: Path) -> Callable[..., Naming]:
    """``match(kind, family, edit, field=...)``: the naming of a tiny model whose stored tensors ``edit`` changed."""

    def matched(kind: str, family: str, edit: Callable[[Stored], object] = lambda _: None, **config: Any) -> Naming:
        model = zoo_models.build(kind, family)
        twin = empty(model)
        headers = described(saved(model, tmp_path))
        tensors = {name: TensorShape(one.dtype, one.shape, 0) for name, one in headers.items()}
        edit(tensors)
        return match_names(twin, DescribedCheckpoint(tmp_path, model.config.to_dict() | config, tensors))

    return matched


def test_what_is_stored_as_it_is_and_what_is_converted(match: Callable[..., Naming]) -> None:
    naming = match("mixtral", "causal")
    experts = {f"model.layers.{i}.mlp.experts.{leaf}" for i in range(2) for leaf in ("gate_up_proj", "down_proj")}
    assert set(naming.converted) == experts and naming.conversion is not None and not naming.extra
    router = "model.layers.0.mlp.gate.weight"
    assert naming.sources[router] == "model.layers.0.block_sparse_moe.gate.weight"
    assert naming.converted["model.layers.0.mlp.experts.down_proj"].operations == ("MergeModulelist",)


def test_missing_names_and_unknown_ones_are_said_as_the_checkpoint_spells_them(match: Callable[..., Naming]) -> None:
    name = "language_model.model.layers.0.mlp.down_proj.weight"
    with pytest.raises(CheckpointError, match=r"model\.language_model\.layers\.0\.mlp\.down_proj\.weight is missing"):
        match("gemma3", "image-text", lambda stored: stored.pop(name))
    bias = name.replace(".weight", ".bias")
    with pytest.raises(CheckpointError, match=f"{bias} is not part of the model"):
        match("gemma3", "image-text", lambda stored: stored.update({bias: TensorShape("F32", (64,), 0)}))


def test_an_expert_that_is_not_stored_is_refused(match: Callable[..., Naming]) -> None:
    def edit(stored: Stored) -> None:
        del stored["model.layers.1.block_sparse_moe.experts.3.w2.weight"]

    with pytest.raises(CheckpointError, match=r"layers\.1\.block_sparse_moe\.experts\.3\.w2\.weight is missing"):
        match("mixtral", "causal", edit)


def test_an_expert_of_another_shape_is_refused_by_its_stored_name(match: Callable[..., Naming]) -> None:
    def edit(stored: Stored) -> None:
        stored["model.layers.1.block_sparse_moe.experts.0.w2.weight"] = TensorShape("F32", (2, 2), 0)

    with pytest.raises(CheckpointError, match=r"experts\.0\.w2\.weight' and 3 more cannot be converted"):
        match("mixtral", "causal", edit)


def test_a_converted_tensor_of_integers_is_refused(match: Callable[..., Naming]) -> None:
    def edit(stored: Stored) -> None:
        name = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
        stored[name] = TensorShape("I8", stored[name].shape, 0)

    with pytest.raises(CheckpointError, match=r"experts\.gate_up_proj'.* quantized weights"):
        match("mixtral", "causal", edit)


@pytest.mark.parametrize(
    ("name", "config", "is_extra"),
    [
        ("language_model.model.layers.6.mlp.down_proj.weight", {"text_config": {"num_nextn_predict_layers": 1}}, True),
        ("language_model.model.layers.6.mlp.down_proj.weight", {}, False),
        ("language_model.model.layers.7.mlp.down_proj.weight", {"num_nextn_predict_layers": 1}, False),
        ("language_model.model.mtp.norm.weight", {}, True),
        ("mtp.fc.weight", {}, True),
        ("audio_tower.proj.weight", {}, True),
        ("language_model.model.foo.weight", {}, False),
        ("vision_tower.vision_model.encoder.layers.9.mlp.fc1.weight", {}, False),
    ],
)
def test_what_lies_beside_a_model_inside_of_another(
    name: str, config: dict[str, Any], is_extra: bool, match: Callable[..., Naming]
) -> None:
    def edit(stored: Stored) -> None:
        stored[name] = TensorShape("F32", (64, 64), 0)

    if is_extra:
        assert match("gemma3", "image-text", edit, **config).extra == (name,)
    else:
        with pytest.raises(CheckpointError, match=f"{name} is not part of the model"):
            match("gemma3", "image-text", edit, **config)


def test_a_half_of_a_fused_tensor_of_another_name_is_refused(match: Callable[..., Naming]) -> None:
    """HRM's attention is one stored matrix of four; stored under an unknown name it is both missing and unknown."""

    def edit(stored: Stored) -> None:
        name = next(name for name in stored if name.endswith("attn.gqkv_proj.weight"))
        stored[name.replace("gqkv_proj", "gqkv")] = stored.pop(name)

    with pytest.raises(CheckpointError, match=r"q_proj\.weight is missing.*gqkv\.weight is not part of the model"):
        match("hrm_text", "causal", edit)

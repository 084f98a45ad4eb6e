"""The model that a config.json describes: transformers' own classes, nothing allocated, every refusal in a sentence."""

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers as hf

from leangrid.errors import ArchitectureError, CheckpointError
from leangrid.models.model_class import (
    build_empty,
    config_of,
    described_model,
    empty_model,
    has_lm_head,
    known_type,
    read_model_config,
    with_experts_apart,
)
from leangrid.models.shapes import DescribedCheckpoint


def _described(**fields: Any) -> DescribedCheckpoint:
    config = tiny_models.CONFIGS["llama2"]().to_dict() | {"architectures": ["LlamaForCausalLM"]} | fields
    return DescribedCheckpoint(Path("model"), config, {})


@pytest.mark.parametrize("name", [None, 7, "walrus", ["llama"]])
def test_a_type_that_transformers_does_not_know_is_refused_with_its_version(name: object) -> None:
    with pytest.raises(ArchitectureError, match=f"not known to transformers {hf.__version__}.*Upgrade") as caught:
        known_type({"model_type": name})
    assert caught.value.exit_code == 2


def test_any_type_of_transformers_is_known() -> None:
    assert all(known_type({"model_type": name}) == name for name in hf.CONFIG_MAPPING)


def test_parameters_are_absent_and_buffers_computed() -> None:
    model = build_empty(tiny_models.CONFIGS["llama3"]())
    assert all(parameter.is_meta for parameter in model.parameters()) and not model.training
    assert all(not buffer.is_meta for buffer in model.buffers())
    assert torch.equal(model.model.rotary_emb.inv_freq, tiny_models.build("llama3").model.rotary_emb.inv_freq)  # pyright: ignore


def test_an_empty_model_has_not_even_buffers() -> None:
    model = empty_model(_described())
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize(
    ("architectures", "expected"),
    [
        (["LlamaForCausalLM"], "LlamaForCausalLM"),
        (["LlamaModel"], "LlamaModel"),
        (None, "LlamaForCausalLM"),
        (["LlamaForSequenceClassification"], "LlamaForSequenceClassification"),
    ],
)
def test_the_class_is_the_one_that_the_config_names(architectures: list[str] | None, expected: str) -> None:
    assert type(empty_model(_described(architectures=architectures))).__name__ == expected


@pytest.mark.parametrize("name", ["os", "LlamaConfig", "GPT2LMHeadModel", "Nothing", 7])
def test_another_class_is_refused(name: object) -> None:
    with pytest.raises(ArchitectureError, match=r"is no llama model of transformers.*LlamaForCausalLM"):
        empty_model(_described(architectures=[name]))


def test_infinities_are_read_as_transformers_writes_them() -> None:
    fields = tiny_models.CONFIGS["llama2"]().to_dict() | {"limits": {"low": {"__float__": "-Infinity"}}}
    assert config_of(fields).limits == {"low": float("-inf")}  # pyright: ignore[reportAttributeAccessIssue]


def test_the_fields_that_are_given_stay_as_they_were() -> None:
    fields = tiny_models.CONFIGS["llama3"]().to_dict()
    before = repr(fields)
    config_of(fields)
    assert repr(fields) == before


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"dtype": "float17"}, "'float17' the weights' dtype"),
        (
            {"rope_scaling": {"rope_type": "spiral", "factor": 2.0}},
            "type 'spiral', which transformers does not compute",
        ),
        ({"rope_scaling": {"rope_type": "su", "factor": 2.0}}, "write longrope"),
    ],
)
def test_configs_that_cannot_be_used_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        build_empty(read_model_config(_described(**fields)))


def test_a_model_that_cannot_be_built_is_refused_in_one_line() -> None:
    with pytest.raises(
        CheckpointError, match=r"no model can be built from the config|the config cannot be used"
    ) as caught:
        empty_model(_described(num_attention_heads=0))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "decodes"), [("llama2", True), ("gpt2", True), ("gemma3n", True), ("bert", False), ("albert", False)]
)
def test_which_models_predict_the_next_token(name: str, decodes: bool) -> None:
    config = tiny_models.CONFIGS[name]()
    kind = "Model" if name in tiny_models.ENCODERS else None
    config.architectures = [type(config).__name__.replace("Config", "Model")] if kind else None
    assert has_lm_head(build_empty(config)) is decodes


def test_a_result_s_config_describes_the_dense_model() -> None:
    fields = _described(quantization_config={"quant_method": "leangrid"}).config
    assert described_model(fields).config.to_dict().get("quantization_config") is None
    assert fields["quantization_config"], "the config that was given was changed"


def test_experts_apart_keep_ties() -> None:
    config = tiny_models.CONFIGS["qwen3_moe"]()
    config.tie_word_embeddings = True
    model: Any = with_experts_apart(build_empty(config))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.layers[0].mlp.experts[3].up_proj.weight.shape == (32, 64)

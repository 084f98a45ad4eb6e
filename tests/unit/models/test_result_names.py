"""Which linear of the model a tensor of a result belongs to."""

import pytest
import tiny_models
from described_tensors import Shaped

from leangrid.models.linears import linear_shapes
from leangrid.models.model_class import build_empty, with_experts_apart
from leangrid.models.result_names import match_result


def _matched(name: str, stored: list[str]) -> dict[str, str]:
    config = tiny_models.CONFIGS[name]()
    described = {one: Shaped((2, 2), "F32") for one in stored}
    return match_result(build_empty(config), with_experts_apart(build_empty(config)), described)


@pytest.mark.parametrize("name", ["llama2", "gpt2", "qwen3_moe", "deepseek_v3"])
def test_names_of_the_model_are_found_in_its_order(name: str) -> None:
    linears = list(linear_shapes(with_experts_apart(build_empty(tiny_models.CONFIGS[name]()))))
    stored = [f"{linear}.{suffix}" for linear in sorted(linears) for suffix in ("codes", "levels")]
    matched = _matched(name, stored)
    assert list(matched) == linears and all(key == path for key, path in matched.items())


def test_mixtral_s_names_lead_to_transformers_modules() -> None:
    leaves = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    expected = {
        f"model.layers.1.block_sparse_moe.experts.{expert}.{theirs}": f"model.layers.1.mlp.experts.{expert}.{ours}"
        for expert in range(4)
        for theirs, ours in leaves.items()
    }
    assert _matched("mixtral", [f"{name}.codes" for name in expected]) == expected


def test_what_belongs_to_no_linear_is_left_out() -> None:
    stored = ["model.norm.weight", "mtp.fc.weight", "model.layers.9.mlp.up_proj.codes", "scale", "lm_head.weight"]
    assert _matched("llama2", stored) == {"lm_head": "lm_head"}

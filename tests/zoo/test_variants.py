"""The other configs that `make zoo VARY=SEED` tries (tests/support/zoo_variants.py, zoo_storage.py)."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from zoo_configs import INNER, tiny_config
from zoo_models import build, run, save, tokens
from zoo_storage import Storage, round_stored, store_as
from zoo_variants import changed, changes

SEEDS = range(24)


def configs(model_type: str, seeds: range = SEEDS) -> list[dict[str, Any]]:
    config = tiny_config(model_type, decoder=True)
    return [changed(config, changes(config, seed)).get_text_config(decoder=True).to_dict() for seed in seeds]


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("llama", ("tie_word_embeddings", "attention_bias", "mlp_bias", "num_hidden_layers", "num_attention_heads",
                   "num_key_value_heads", "head_dim", "hidden_size", "intermediate_size", "vocab_size")),
        ("qwen3_5", ("tie_word_embeddings", "attention_bias", "num_hidden_layers", "num_key_value_heads",
                     "vocab_size")),
        ("deepseek_v3", ("first_k_dense_replace", "n_routed_experts", "n_shared_experts", "moe_intermediate_size")),
    ],
)  # fmt: skip
def test_seeds_differ_in_what_people_s_configs_differ_in(model_type: str, fields: tuple[str, ...]) -> None:
    found = configs(model_type)
    for field in fields:
        assert len({one[field] for one in found}) > 1, field


def test_counts_of_layers_go_down_to_one_and_patterns_end_anywhere() -> None:
    found = [one for one in configs("qwen3_5_text") if len(one["layer_types"]) == one["num_hidden_layers"]]
    assert len(found) == len(SEEDS)
    assert {1, 5} <= {one["num_hidden_layers"] for one in found}
    assert len({one["layer_types"][-1] for one in found}) == 2


def test_inner_sizes_are_no_multiples_of_a_group() -> None:
    changed_sizes = {one["intermediate_size"] for one in configs("llama")} - {INNER}
    assert len(changed_sizes) > 1 and all(size % 32 for size in changed_sizes)


def test_the_same_seed_draws_the_same() -> None:
    assert configs("gemma3_text", range(3)) == configs("gemma3_text", range(3))


def test_a_checkpoint_stored_another_way_is_the_same_model(tmp_path: Path) -> None:
    model, ids = build("llama", "causal"), tokens()
    round_stored(model)
    store_as(save(model, tmp_path / "source"), Storage(halved=True, shards=3, older=True))
    files = sorted(path.name for path in (tmp_path / "source").glob("*.safetensors"))
    assert files == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert {x.dtype for name in files for x in load_file(tmp_path / "source" / name).values()} == {torch.bfloat16}
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.float32)
    assert torch.equal(run(opened.eval(), ids), run(model, ids))

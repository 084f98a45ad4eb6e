"""What plan and manifest say of a model: its blocks, what stays and why, what its source is stored in."""

from collections.abc import Callable
from pathlib import Path

import pytest
import quantized_sources
import tiny_models
import torch

from leangrid.models.skeleton import Skeleton
from leangrid.planning.plan import plan
from leangrid.planning.structure import describe_choice, describe_kept, describe_source, describe_structure
from leangrid.recipe import Recipe
from leangrid.storage.source import open_source

Tiny = Callable[..., Path]


def test_blocks_of_one_kind_are_one_entry(tiny: Tiny) -> None:
    found = describe_structure(Skeleton(open_source(tiny("qwen3_moe"))))
    groups = [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.experts.*.gate_proj", "mlp.experts.*.up_proj"],
        ["mlp.experts.*.down_proj"],
    ]
    kind = {"count": 2, "first": "model.layers.0", "module": "Qwen3MoeDecoderLayer", "groups": groups}
    assert found == {
        "model": "Qwen3MoeForCausalLM",
        "lists": ["model.layers"],
        "blocks": 2,
        "calls": 2,
        "kinds": [kind],
        "flows": [],
        "idle": 0,
    }


def test_blocks_with_other_groups_are_other_kinds(tiny: Tiny) -> None:
    skeleton = Skeleton(open_source(tiny("llama3")))
    skeleton.select(["model.layers.0.*"], [])
    first, second = describe_structure(skeleton)["kinds"]
    assert (first["count"], first["groups"], second["first"]) == (1, [], "model.layers.1")


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("llama3", [("model.embed_tokens", "is a table of tokens", 1), ("lm_head", "outside of the blocks", 1)]),
        ("llama3_tied", [("model.embed_tokens", "is a table of tokens", 1)]),
        ("bert", [("embeddings", "is a table of tokens", 3), ("pooler", "outside of the blocks", 1)]),
    ],
)
def test_what_stays_outside_of_the_blocks(tiny: Tiny, name: str, kept: list) -> None:
    found = describe_kept(Skeleton(open_source(tiny(name))))
    assert [(entry["name"], entry["why"], entry["count"]) for entry in found] == kept


def test_what_stays_inside_of_them(tiny: Tiny) -> None:
    skeleton = Skeleton(open_source(tiny("qwen3_moe")))
    skeleton.select(["*.down_proj", "*.gate_proj", "*.up_proj"], [])
    found = {(entry["name"], entry["why"]): entry["count"] for entry in describe_kept(skeleton)}
    assert found["model.layers.*.mlp.gate", "routes tokens to experts"] == 2
    assert found["*.down_proj", "--ignore"] == found["*.gate_proj", "--ignore"] == 8
    assert next(iter(describe_choice(skeleton))) == "--ignore *.gate_proj: 8 linears stay as they are stored"
    skeleton = Skeleton(open_source(tiny("llama3")))
    skeleton.select([], ["*.o_proj"])
    assert list(describe_choice(skeleton)) == ["--only names others: 12 linears stay as they are stored"]
    assert {"name": "others", "why": "--only names others", "count": 12} in describe_kept(skeleton)


def test_a_source_in_fp8_says_what_it_is_stored_in(tmp_path: Path) -> None:
    kind = quantized_sources.KINDS["fp8-blocks"]

    def store(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        made = kind.make(*weight.shape, torch.Generator().manual_seed(0)).tensors
        return {name.removesuffix("weight") + end: tensor for end, tensor in made.items()}

    plain = tiny_models.save("llama3", tmp_path / "plain", torch.bfloat16)
    source = quantized_sources.store_linears(plain, tmp_path / "fp8", kind.entry, store)
    found = describe_source(Skeleton(open_source(source)))
    assert found is not None and (found["method"], found["tensors"]) == ("fp8", 14) and "FP8" in found["what"]
    planned = plan(source, Recipe(scheme="NU4", samples=4, length=32))
    assert planned.stored_as == found and found["bytes"] < planned.bytes_before
    assert plan(plain, Recipe(scheme="NU4", samples=4, length=32)).stored_as is None


def test_the_plan_counts_what_is_ignored(tiny: Tiny) -> None:
    every = plan(tiny("llama3"), Recipe(scheme="W4A16_G32", samples=4, length=32))
    fewer = plan(tiny("llama3"), Recipe(scheme="W4A16_G32", samples=4, length=32, ignore=("*.down_proj",)))
    assert (every.layers, fewer.layers) == (14, 12) and fewer.bytes_before == every.bytes_before
    saved = sum(layer.bytes_before - layer.bytes_after for layer in every.layer_plans if "down_proj" in layer.name)
    assert fewer.bytes == every.bytes + saved

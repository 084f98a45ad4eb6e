"""Units, candidates and ranges of a budget, and the recipe that a choice becomes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import leangrid
from leangrid.errors import FormatError, RecipeError
from leangrid.models.skeleton import Skeleton
from leangrid.planning.budget import Budget, without_budget
from leangrid.planning.resolve import open_checkpoint, resolve_recipe
from leangrid.planning.sizes import compute_sizes
from leangrid.recipe import Recipe
from leangrid.storage.source import open_source

Tiny = Callable[..., Path]


def _budget(source: Path, **fields: Any) -> tuple[Skeleton, Budget]:
    skeleton = Skeleton(open_source(source))
    return skeleton, Budget.of(
        skeleton, resolve_recipe(Recipe(**{"scheme": "W4A16_G32", "bits": 5.0, **fields}), skeleton)
    )


def _leaves(budget: Budget) -> list[set[str]]:
    return [{name.rpartition(".")[2] for name in unit.names} for unit in budget.units]


def test_what_engines_fuse_is_a_unit(tiny: Tiny) -> None:
    _, budget = _budget(tiny("llama2"))
    block = [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}]
    assert _leaves(budget) == block * 2
    _, budget = _budget(tiny("qwen3_moe"))
    assert [len(unit.names) for unit in budget.units] == [3, 1, 12] * 2
    assert [unit.experts for unit in budget.units] == [False, False, True] * 2
    _, budget = _budget(tiny("deepseek_v3"), scheme="W4A16")
    assert {"q_a_proj", "kv_a_proj_with_mqa"} in _leaves(budget)  # which read the same, but not one after another


@pytest.mark.parametrize("name", ["llama2", "qwen3_moe"])
def test_the_recipe_of_a_choice_gives_each_unit_its_scheme_and_bytes(name: str, tiny: Tiny) -> None:
    skeleton, budget = _budget(tiny(name))
    numbers = [(3 * number + number // 2) % len(budget.candidates) for number in range(len(budget.units))]
    recipe = budget.chosen(numbers)
    assert not recipe.has_budget
    for unit, number in zip(budget.units, numbers, strict=True):
        for layer in unit.names:
            assert recipe.for_layer(layer).scheme == budget.candidates[number].name, layer
    sizes = {layer.name: layer.bytes_after for layer in compute_sizes(skeleton, recipe).layers}
    for unit, number in zip(budget.units, numbers, strict=True):
        assert sum(sizes[layer] for layer in unit.names) == unit.sizes[number]
    experts = [key for key in recipe.layers if "experts" in key]
    assert len(experts) <= 3 * 2  # one pattern for each linear of an expert and block


@pytest.mark.parametrize("bits", [3.2, 4.25, 6.0, 9.0])
def test_without_data_it_is_spent_evenly(bits: float, tiny: Tiny) -> None:
    planned = leangrid.plan(tiny("llama2"), Recipe(scheme="W4A16_G32", bits=bits))
    assert bits - 0.35 < planned.bits_per_weight <= bits
    assert planned.budget["bits"] == bits
    assert planned.seconds["measure"] > 0
    assert planned.budget["bits_from"] < bits < planned.budget["bits_to"]


def test_candidates_are_of_one_kind(tiny: Tiny) -> None:
    def names(**fields: Any) -> list[str]:
        return [scheme.name for scheme in _budget(tiny("llama2"), **fields)[1].candidates]

    widths = (2, 3, 4, 5, 6, 8)
    assert names(scheme="W3A16_G32_SYM") == [f"W{bits}A16_G32_SYM" for bits in widths]
    assert names(scheme="GPTQ4_G32") == [f"GPTQ{bits}_G32" for bits in widths]
    assert names(format="mlx") == [f"W{bits}A16_G32" for bits in widths]
    assert names(scheme="Q4_K") == ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0"]
    assert names(scheme="GPTQ_Q5_0", bits=6.0)[0] == "GPTQ_Q4_0"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"bits": 2.0}, r"2 bits a weight are below the smallest scheme.*3\.087 to 9\.274 bits"),
        ({"bits": 9.5}, r"above the largest scheme.*3\.087 to 9\.274 bits"),
        ({"size": "100kB"}, r"100,000 bytes are below the smallest scheme .*to [\d,]+ bytes"),
        ({"size": "1GB"}, "above the largest scheme"),
        ({"bits": 4.5, "scheme": "NU4"}, "NU4 layers all have the same"),
    ],
)
def test_a_budget_that_cannot_be_spent_is_refused_with_the_range(
    fields: dict, words: str, tiny: Tiny, tmp_path: Path
) -> None:
    recipe = Recipe(**{"scheme": "W4A16_G32", **fields})
    with pytest.raises(RecipeError, match=words):
        leangrid.quantize(tiny("llama2"), tmp_path / "out", recipe)
    with pytest.raises(RecipeError, match=words):
        leangrid.plan(tiny("llama2"), recipe)
    assert not list(tmp_path.iterdir())


def test_the_ends_of_the_range_are_in_it(tiny: Tiny) -> None:
    for bits in (3.087, 9.274):
        skeleton, budget = _budget(tiny("llama2"), bits=bits)
        assert compute_sizes(skeleton, budget.spread()).bits_per_weight <= bits


def test_containers_and_models_that_cannot_mix_are_refused(tiny: Tiny) -> None:
    for container in ("gptq", "awq"):
        with pytest.raises(FormatError, match=f"{container} holds one scheme for all layers"):
            leangrid.plan(tiny("llama2"), Recipe(scheme="W4A16_G32", bits=4.9, format=container))
    with pytest.raises(FormatError, match="Conv1D"):
        open_checkpoint(tiny("gpt2"), Recipe(scheme="W4A16", bits=4.9))
    with pytest.raises(RecipeError, match="calls this one more than once"):
        leangrid.plan(tiny("albert"), Recipe(scheme="W4A16", bits=4.9))


def test_a_recipe_has_one_budget_and_no_layers_beside_it() -> None:
    assert Recipe(size="5GB").size == 5_000_000_000
    assert Recipe(size="1.5GiB").size == 3 << 29
    assert "bits" not in Recipe().model_dump()
    assert without_budget(Recipe(bits=4.25)).fingerprint() == Recipe().fingerprint()
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"bits": 4.0, "size": "5GB"}, "two budgets"),
        ({"bits": 4.0, "layers": {"down_proj": "W8A16"}}, "layers chooses some"),
        ({"size": "much"}, "700MiB"),
        ({"bits": True}, "must be a number"),
    )
    for fields, words in wrong:
        with pytest.raises(RecipeError, match=words):
            Recipe(**fields)

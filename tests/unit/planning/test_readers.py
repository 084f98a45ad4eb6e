"""What the plan, a notice and the manifest say of readers; that it is true is in tests/interop."""

from collections.abc import Callable
from pathlib import Path

import pytest

from leangrid.models.skeleton import Skeleton
from leangrid.planning import mlx_lm
from leangrid.planning.readers import describe_readers, opened_in
from leangrid.planning.resolve import resolve_recipe
from leangrid.recipe import Recipe
from leangrid.storage.source import open_source

GGUF = "no: the GGUF export does not know 'qwen3_moe'"
NO = "no: it takes no zero points of experts; it opens W4A16_G32_SYM"


@pytest.mark.parametrize(
    ("model", "scheme", "word"),
    [
        ("llama3", "W4A16_G32", "yes"),
        ("llama3", "NU4", None),
        ("qwen3_moe", "W4A16_G32", NO),
        ("qwen3_moe", "W4A16_G32_SYM", "yes"),
    ],
)
def test_what_opens_a_result(tiny: Callable[..., Path], model: str, scheme: str, word: str | None) -> None:
    skeleton = Skeleton(open_source(tiny(model)))
    recipe = resolve_recipe(Recipe(scheme=scheme), skeleton)
    assert opened_in(skeleton, recipe) == {"leangrid.load": "yes"} | ({} if word is None else {"transformers": word})
    said = describe_readers(skeleton, recipe)
    assert len(said) == (word == NO) and all(NO.removeprefix("no: ") in one for one in said)


@pytest.mark.parametrize(("model", "word"), [("llama3", "yes"), ("qwen3_moe", GGUF)])
def test_what_llama_cpp_will_not_open_is_said_before_work(tiny: Callable[..., Path], model: str, word: str) -> None:
    skeleton = Skeleton(open_source(tiny(model)))
    recipe = resolve_recipe(Recipe(scheme="Q4_0"), skeleton)
    opened = opened_in(skeleton, recipe)
    assert list(opened) == ["leangrid.load", "llama.cpp"] and opened["llama.cpp"].startswith(word)
    said = describe_readers(skeleton, recipe)
    assert [one.startswith("leangrid.load opens the result, llama.cpp does not: the GGUF") for one in said] == (
        [] if word == "yes" else [True]
    )


@pytest.mark.parametrize("model", ["llama3", "qwen3_moe"])
def test_without_mlx_lm_packed_experts_are_doubtful_and_nothing_else(
    tiny: Callable[..., Path], model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlx_lm, "is_installed", lambda: False)
    skeleton = Skeleton(open_source(tiny(model)))
    said = describe_readers(skeleton, resolve_recipe(Recipe(scheme="W4A16_G32", format="mlx"), skeleton))
    assert len(said) == (model == "qwen3_moe") and all("mlx-lm may not: it merges experts" in one for one in said)


@pytest.mark.parametrize("obstacle", [None, "ValueError: Received 48 parameters"])
def test_mlx_lm_is_asked_of_the_tensors_that_will_be_written(
    tiny: Callable[..., Path], obstacle: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, tuple[str, tuple[int, ...]]] = {}
    monkeypatch.setattr(mlx_lm, "is_installed", lambda: True)
    monkeypatch.setattr(mlx_lm, "find_obstacle", lambda config, tensors: asked.update(tensors) or obstacle)
    skeleton = Skeleton(open_source(tiny("qwen3_moe")))
    recipe = resolve_recipe(Recipe(scheme="W4A16_G32", format="mlx"), skeleton)
    word = opened_in(skeleton, recipe)["mlx-lm"]
    assert word == "yes" if obstacle is None else word.startswith(f"no: {obstacle}; leangrid export --to mlx stacks")
    rows, cols = skeleton.shape("model.layers.0.mlp.experts.1.up_proj")
    assert asked["model.layers.0.mlp.experts.1.up_proj.weight"] == ("U32", (rows, cols // 8))
    assert asked["model.layers.0.mlp.experts.1.up_proj.scales"] == ("F32", (rows, cols // 32))
    plain = {name for name in asked if not name.endswith((".scales", ".biases"))}
    assert plain == set(skeleton.checkpoint.tensors)

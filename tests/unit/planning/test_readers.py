"""What the plan, a notice and the manifest say of readers; that it is true is in tests/interop."""

from collections.abc import Callable
from pathlib import Path

import pytest

from leangrid.models.skeleton import Skeleton
from leangrid.planning.readers import describe_readers, opened_in
from leangrid.planning.resolve import resolve_recipe
from leangrid.recipe import Recipe
from leangrid.storage.source import open_source

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

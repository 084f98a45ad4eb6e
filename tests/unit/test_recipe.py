"""One door: whatever is wrong with a recipe, and however its fields come in, is a RecipeError of one sentence."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import leangrid
from leangrid.errors import RecipeError
from leangrid.recipe import Recipe, Scheme

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"samples": 0}, "samples must be greater than or equal to 1, not 0"),
    ({"samples": "abc\ndef"}, "samples must be a valid integer"),
    ({"samples": None}, "samples must be a valid integer"),
    ({"scheme": "NU9"}, "9 bits are not available in 'NU9'"),
    ({"scheme": 4}, "scheme must be a valid string"),
    ({"p": float("nan")}, "p must be a finite number"),
    ({"search": "x" * 1000}, "search must be 'optimal' or 'lloyd'"),
    ({"sample": 4}, "'sample' is no field of a recipe.*Did you mean samples"),
    ({"unknown": 1}, "'unknown' is no field of a recipe"),
    ({"layers": {"a": 3}}, r"layers\.a must be a valid string"),
    ({"layers": {"re:(": "W4A16"}}, "no pattern"),
]


@pytest.mark.parametrize(("fields", "said"), WRONG)
@pytest.mark.parametrize(
    "door", [lambda fields: Recipe(**fields), lambda fields: Recipe.build(**fields), Recipe.model_validate]
)
def test_every_door_says_the_same_sentence(
    door: Callable[[dict[str, Any]], Recipe], fields: dict[str, Any], said: str
) -> None:
    with pytest.raises(RecipeError, match=said) as told:
        door(fields)
    assert "\n" not in str(told.value) and len(str(told.value)) < 500 and told.value.exit_code == 2


def test_files_and_json_come_in_by_it_too(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text("samples = 0\n")
    with pytest.raises(RecipeError, match="samples must be"):
        Recipe.from_file(tmp_path / "r.toml")
    for text in ('{"length": 2}', '{"le', "[]"):
        with pytest.raises(RecipeError):
            Recipe.model_validate_json(text)
    with pytest.raises(RecipeError, match="grid must be"):
        Scheme(grid="x", method="rtn", bits=3, group_size=None)  # pyright: ignore[reportArgumentType]


def test_a_sound_recipe_is_copied_and_pickled_as_before() -> None:
    recipe = Recipe(scheme="nu4", p=2)
    assert pickle.loads(pickle.dumps(recipe)) == recipe == copy.deepcopy(recipe) == Recipe.model_validate(recipe)  # noqa: S301
    assert Recipe.model_validate(recipe.model_dump()) == recipe == Recipe.model_validate_json(recipe.model_dump_json())
    assert recipe.model_copy(update={"samples": 3}).samples == 3 and leangrid.Recipe is Recipe

"""Whatever is wrong with a recipe, and however it is made, is a RecipeError of one sentence."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import leangrid
from leangrid.errors import RecipeError
from leangrid.recipe import Recipe
from leangrid.schemes import Scheme

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
    ({"ignore": ("re:(",)}, "no pattern.*ignore"),
    ({"only": ("",)}, "an empty pattern.*only"),
    ({"ignore": 3}, "ignore must be a valid tuple"),
    ({"correct": 1.5}, 'correct must be a number from 0 to 1, or "auto", not 1.5'),
    ({"correct": -0.1}, 'correct must be a number from 0 to 1, or "auto"'),
    ({"correct": float("nan")}, 'correct must be a number from 0 to 1, or "auto"'),
    ({"correct": "automatic"}, "or \"auto\", not 'automatic'"),
    ({"correct": True}, 'correct must be a number from 0 to 1, or "auto", not True'),
    ({"correct": []}, 'correct must be a number from 0 to 1, or "auto"'),
]


@pytest.mark.parametrize(("fields", "said"), WRONG)
@pytest.mark.parametrize(
    "make",
    [lambda fields: Recipe(**fields), Recipe.model_validate, lambda fields: Recipe().model_copy(update=fields)],
    ids=["constructor", "model_validate", "model_copy"],
)
def test_a_wrong_field_is_one_sentence_in_whichever_way_a_recipe_is_made(
    make: Callable[[dict[str, Any]], Recipe], fields: dict[str, Any], said: str
) -> None:
    with pytest.raises(RecipeError, match=said) as told:
        make(fields)
    assert "\n" not in str(told.value) and len(str(told.value)) < 500 and told.value.exit_code == 2


def test_wrong_files_and_json_are_refused_too(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text("samples = 0\n")
    with pytest.raises(RecipeError, match="samples must be"):
        Recipe.from_file(tmp_path / "r.toml")
    for text in ('{"length": 2}', '{"le', "[]"):
        with pytest.raises(RecipeError):
            Recipe.model_validate_json(text)


def test_a_scheme_is_checked_in_whichever_way_it_is_made() -> None:
    with pytest.raises(RecipeError, match="method must be"):
        Scheme(grid="affine", method="x", bits=3, group_size=None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(RecipeError, match="7 bits are not available in 'GPTQ7_G64'"):
        Scheme(grid="affine", method="gptq", bits=7, group_size=64)
    with pytest.raises(RecipeError, match="a group of -1 columns"):
        Scheme.parse("W4A16_G64").model_copy(update={"group_size": -1})
    with pytest.raises(RecipeError, match="'RTN4_EXACT' mixes a baseline with _EXACT"):
        Scheme.parse("rtn4_exact")


@pytest.mark.parametrize("text", ["W4A16_G64_SYM", "W2A16_EXACT", "NU3", "GPTQ8_G128", "RTN4", "Q4_K", "GPTQ_Q4_1"])
def test_the_name_of_a_scheme_parses_to_it(text: str) -> None:
    assert Scheme.parse(text.lower()).name == text and Scheme.parse(Scheme.parse(text).name) == Scheme.parse(text)


def test_a_sound_recipe_is_copied_and_pickled_as_before() -> None:
    recipe = Recipe(scheme="nu4", p=2)
    assert pickle.loads(pickle.dumps(recipe)) == recipe == copy.deepcopy(recipe) == Recipe.model_validate(recipe)  # noqa: S301
    assert Recipe.model_validate(recipe.model_dump()) == recipe == Recipe.model_validate_json(recipe.model_dump_json())
    assert recipe.model_copy(update={"samples": 3}).samples == 3 and leangrid.Recipe is Recipe


def test_the_share_of_the_correction_is_a_number_or_auto() -> None:
    assert [Recipe(correct=value).correct for value in (0, 0.25, "0.5", "auto", None)] == [0.0, 0.25, 0.5, "auto", None]  # pyright: ignore[reportArgumentType]
    assert Recipe(correct=0.5).streams == Recipe(correct="auto").streams == 2
    assert Recipe(correct="auto").fingerprint() != Recipe(correct=0.5).fingerprint()
    assert Recipe(correct="auto").measures_correction
    assert not Recipe(correct=0.5).measures_correction


def test_patterns_are_part_of_the_fingerprint_where_there_are_any(tmp_path: Path) -> None:
    plain = Recipe(scheme="NU4")
    assert not {"ignore", "only"} & plain.model_dump().keys()
    named = Recipe(scheme="NU4", ignore=("lm_head", "*.down_proj", "lm_head"))
    assert named.ignore == ("lm_head", "*.down_proj") and named.model_dump()["ignore"] == ["lm_head", "*.down_proj"]
    assert len({recipe.fingerprint() for recipe in (plain, named, Recipe(scheme="NU4", only=("lm_head",)))}) == 3
    assert Recipe.model_validate(named.model_dump()) == named == Recipe.model_validate_json(named.model_dump_json())
    (tmp_path / "r.toml").write_text('scheme = "NU4"\nignore = ["lm_head", "*.down_proj"]\n')
    assert Recipe.from_file(tmp_path / "r.toml") == named


def test_an_effort_fills_in_what_the_recipe_leaves_open(tmp_path: Path) -> None:
    def settings(**fields: Any) -> tuple[Any, ...]:
        resolved = Recipe(scheme=fields.pop("scheme", "NU4"), **fields).resolved()
        assert Recipe.model_validate(resolved.model_dump()) == resolved  # as the manifest holds it
        return resolved.p, resolved.correct, resolved.refine, resolved.tune, resolved.finish

    assert settings(effort="fast") == (4, 0, 0, None, None)
    assert settings(effort="fast", scheme="W4A16") == (2, 0, 0, None, None)
    assert settings() == settings(effort="good") == settings(tune=0)
    assert settings(effort="best") == (*settings()[:3], 4, 4)
    assert settings(effort="best", tune=2)[3] == 2 and not settings(effort="best", tune=0)[3]
    assert settings(effort="best", finish=2)[3:] == (4, 2) and not settings(effort="best", finish=0)[4]
    assert settings(effort="fast", correct=0.25, refine=3) == (4, 0.25, 3, None, None)
    (tmp_path / "r.toml").write_text('scheme = "NU4"\neffort = "best"\n')
    assert Recipe.from_file(tmp_path / "r.toml").resolved().tune == 4


def test_an_effort_is_part_of_the_fingerprint_where_it_is_asked_for() -> None:
    prints = {recipe.fingerprint() for recipe in (Recipe(), Recipe(effort="good"), Recipe(tune=0))}
    assert prints == {Recipe().fingerprint()} and "effort" not in Recipe().model_dump()
    assert len({Recipe(effort="best").fingerprint(), Recipe(effort="best", tune=0).fingerprint(), *prints}) == 3
    assert Recipe(finish=0).fingerprint() == Recipe().fingerprint() != Recipe(finish=1).fingerprint()
    assert Recipe(finish=1).holds_out and Recipe(tune=1).holds_out and not Recipe().holds_out


@pytest.mark.parametrize("scheme", ["GPTQ4_G64", "RTN4", "GPTQ_Q4_1"])
def test_a_baseline_has_no_effort(scheme: str) -> None:
    with pytest.raises(RecipeError, match=f"{scheme} is a baseline, which knows no effort 'best'"):
        Recipe(scheme=scheme, effort="best").resolved()


def test_an_unknown_effort_is_refused_with_those_there_are() -> None:
    with pytest.raises(RecipeError, match=r"fast.*good.*best"):
        Recipe(effort="better")  # pyright: ignore[reportArgumentType]

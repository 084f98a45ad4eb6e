"""Patterns name linears as they are read: globs at the end of a name, regular expressions over all of it."""

import pytest

from leangrid.errors import RecipeError
from leangrid.patterns import Pattern

NAME = "model.layers.3.mlp.down_proj"


@pytest.mark.parametrize(
    "text", ["down_proj", "mlp.down_proj", NAME, "*", "*.down_proj", "model.layers.[0-3].*", "re:.*down_proj"]
)
def test_these_name_it(text: str) -> None:
    assert Pattern(text).matches(NAME)


@pytest.mark.parametrize(
    "text", ["own_proj", "mlp", "model.layers.3", "Down_proj", "model.layers.[0-2].*", "re:model", "re:down_proj"]
)
def test_these_do_not(text: str) -> None:
    assert not Pattern(text).matches(NAME)


@pytest.mark.parametrize("text", ["x_proj", "*.x_proj", r"re:.*\bx_proj", "re:.*(x_proj|o_proj)", "re:.*x_proj$"])
def test_a_pattern_in_which_the_last_part_stands_spells_the_linear(text: str) -> None:
    assert Pattern(text).spells("layers.0.mixer.x_proj")


@pytest.mark.parametrize("text", ["*", "layers.0.*", "re:.*_proj", "*x_project", "max_proj"])
def test_others_do_not(text: str) -> None:
    assert not Pattern(text).spells("layers.0.mixer.x_proj")


@pytest.mark.parametrize("text", ["", "  ", "re:(", "re:*"])
def test_what_is_no_pattern_is_refused_with_the_option(text: str) -> None:
    with pytest.raises(RecipeError, match=r"pattern.*--only") as told:
        Pattern(text, "--only").check()
    assert str(told.value).count("\n") == 0


def test_the_nearest_names_are_those_spelled_alike() -> None:
    names = [f"model.layers.{block}.mlp.{leaf}" for block in range(2) for leaf in ("down_proj", "gate_proj")]
    assert Pattern("*.dwon_proj").nearest(names)[0] == "down_proj"
    assert "model.layers.*.mlp.gate_proj" in Pattern("model.layers.*.mpl.gate_proj").nearest(names)
    assert Pattern("zzz").nearest(names) == []

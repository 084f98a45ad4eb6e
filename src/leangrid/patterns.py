"""Patterns that name linears: the keys of ``Recipe.layers``, the entries of ``Recipe.ignore`` and ``Recipe.only``."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import translate
from functools import cached_property

from leangrid.errors import RecipeError

REGEX = "re:"


def compile_regex(text: str, option: str, way_out: str) -> re.Pattern[str]:
    """The regular expression behind ``re:``; RecipeError naming the ``option`` where it is none."""
    try:
        return re.compile(text.removeprefix(REGEX))
    except re.error as error:
        raise RecipeError(f"'{text}' is no pattern: {error}", option, way_out) from None


@dataclass(frozen=True)
class Pattern:
    """One entry of ``ignore`` or ``only``.

    A glob (``*``, ``?``, ``[0-3]``) matches a whole name, or the end of one that begins behind a dot; ``re:`` and a
    regular expression match a whole name.

    Attributes:
        text: as it was given.
        option: of which option, for messages.

    Example:
        >>> Pattern("down_proj").matches("model.layers.0.mlp.down_proj")
        True
        >>> Pattern("re:.*layers.[01].*").matches("model.layers.2.mlp.down_proj")
        False
    """

    text: str
    option: str = "--ignore"

    @cached_property
    def _compiled(self) -> re.Pattern[str]:
        if not self.text.strip():
            raise RecipeError("an empty pattern", self.option, "Write such as lm_head or '*.down_proj'")
        if self.text.startswith(REGEX):
            return compile_regex(self.text, self.option, "Write such as 're:.*down_proj'")
        return re.compile(f"{translate(self.text)}|{translate(f'*.{self.text}')}")

    def check(self) -> None:
        """RecipeError where it is empty or no regular expression."""
        _ = self._compiled

    def matches(self, name: str) -> bool:
        """Whether it names the linear ``name``."""
        return self._compiled.fullmatch(name) is not None

    def spells(self, name: str) -> bool:
        """Whether the last part of ``name`` stands in it as a word: ``*.x_proj`` spells ``mixer.x_proj``, ``*`` does
        not."""
        last = re.escape(name.rpartition(".")[2])
        return re.search(rf"(?<!\w){last}(?!\w)", self.text.removeprefix(REGEX).replace("\\b", "")) is not None

    def nearest(self, names: Iterable[str]) -> list[str]:
        """Up to three of ``names``, blocks' numbers left open, that are spelled most like it."""
        open_numbers = (re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names)
        known = dict.fromkeys(part for name in open_numbers for part in (name, name.rpartition(".")[2]))
        return get_close_matches(self.text.removeprefix(REGEX).lstrip("*."), list(known), 3, 0.5)

"""The names that transformers gives to stored tensors while it loads.

A mixture of experts has tens of thousands of names that differ in nothing but the numbers of blocks and experts, and
transformers tries every pattern of the model's mapping on each. Here one name is renamed for all that are alike."""

import re
from collections.abc import Iterable, Sequence

from transformers.core_model_loading import WeightConverter, WeightRenaming, WeightTransform, rename_source_key

_NUMBER = re.compile(r"(?<=\.)(\d+)(?=\.)")  # of a block or an expert, in a name
_FIRST = 900_000_000  # stands for the first number of a name, the next one for the second
_STAND_IN = re.compile(r"(9000000\d\d)")
_DIGITS = re.compile(r"(?<![\w\\])\d+|\\d(?![+*])")  # in a pattern: numbers as such, or numbers of so many digits
_WHOLE = re.compile(r"(?<=\.)\d+(?=\\?\.|\)|$)")  # a pattern's number that a name's is equal to or not


class Renamer:
    """transformers' renamings and converters of one model, applied to names alone.

    Args:
        renamings: every one that matches is applied, in this order.
        converters: the first that matches is applied then.
    """

    def __init__(self, renamings: Sequence[WeightRenaming], converters: Sequence[WeightConverter]) -> None:
        self._renamings, self._converters = list(renamings), list(converters)
        self._literal = _literal_numbers([*self._renamings, *self._converters])
        self._known: dict[tuple[str, ...], tuple[str, str | None] | None] = {}

    def __call__(self, name: str) -> tuple[str, str | None]:
        """The new name, and the pattern of the converter that takes the tensor; None where none does."""
        parts = _NUMBER.split(name)  # texts and numbers in turn
        numbers, literal = parts[1::2], self._literal
        if not numbers or literal is None or len(set(numbers)) < len(numbers):  # a pattern may take one for the other
            return self._renamed(name)
        if not literal.isdisjoint(numbers):  # they belong to the texts
            parts = _joined(parts, literal)
            numbers = parts[1::2]
        texts = tuple(parts[::2])
        if texts not in self._known:
            self._known[texts] = self._renamed_alike(texts)
        known = self._known[texts]
        return self._renamed(name) if known is None else (known[0].format(*numbers), known[1])

    def _renamed(self, name: str) -> tuple[str, str | None]:
        return rename_source_key(name, self._renamings, self._converters)

    def _renamed_alike(self, texts: tuple[str, ...]) -> tuple[str, str | None] | None:
        """What becomes of names of these texts with numbers between them: a format string that takes the numbers, and
        the converter's pattern; None where a transform takes them that computes with numbers, or goes by what it saw
        before."""
        alike = texts[0] + "".join(f"{_FIRST + place}{text}" for place, text in enumerate(texts[1:]))
        name = alike
        for one in (*self._renamings, *self._converters):
            if type(one).rename_source_key is not WeightTransform.rename_source_key and one.compiled_sources.search(
                name
            ):
                return None
            if isinstance(one, WeightRenaming):
                name, _ = one.rename_source_key(name)
        target, pattern = self._renamed(alike)
        found = _STAND_IN.split(target.replace("{", "{{").replace("}", "}}"))
        return "".join(f"{{{int(part) - _FIRST}}}" if n % 2 else part for n, part in enumerate(found)), pattern


def _joined(parts: list[str], literal: frozenset[str]) -> list[str]:
    """Texts and numbers in turn, where the numbers ``literal`` are parts of the texts around them."""
    joined = parts[:1]
    for number, text in zip(parts[1::2], parts[2::2], strict=True):
        if number in literal:
            joined[-1] += number + text
        else:
            joined += (number, text)
    return joined


def _literal_numbers(transforms: Iterable[WeightRenaming | WeightConverter]) -> frozenset[str] | None:
    """The numbers that these patterns name, such as 0 in ``mlp\\.0\\.``; None where a pattern tells numbers apart in
    another way."""
    found: set[str] = set()
    for one in transforms:
        for pattern in (*one.source_patterns, one.scope_prefix or ""):
            for digits in _DIGITS.finditer(pattern):
                whole = _WHOLE.match(pattern, digits.start())
                if whole is None or whole.end() != digits.end():
                    return None
                found.add(digits[0])
    return frozenset(found)

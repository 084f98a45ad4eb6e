"""Names renamed once for all that are alike are those that transformers gives to each."""

import re
from typing import Any

import pytest
from transformers.conversion_mapping import _build_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from leangrid.models import renaming
from leangrid.models.renaming import Renamer

MAPPINGS = _build_checkpoint_conversion_mapping()
NUMBERS = ((0, 0, 1), (2, 3, 2), (7, 11, 0), (61, 255, 4))


def _like(pattern: str) -> str:
    """A name that a pattern of a mapping is likely to match."""
    text = re.sub(r"\(\?[^)]*\)", "", pattern.replace(r"\d+", "7").replace("\\", "").replace(".*", "zz"))
    return text.strip("^$").replace("(.+)", "x.y").replace("(", "").replace(")", "").split("|")[0]


@pytest.mark.parametrize("kind", sorted(MAPPINGS))
def test_every_mapping_of_transformers(kind: str) -> None:
    """Also of mappings that compute with numbers, name some, or go by what they saw before."""
    transforms = MAPPINGS[kind]
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    renamer = Renamer(renamings, converters)
    for pattern in (pattern for one in transforms for pattern in one.source_patterns):
        for a, b, c in NUMBERS:
            for name in (
                f"model.layers.{a}.{_like(pattern)}.{b}.weight",
                f"model.layers.{a}.mlp.experts.{b}.{_like(pattern)}",
                f"{_like(pattern)}.{a}.x.{b}.{c}.bias".replace("7", str(c)),
            ):
                assert renamer(name) == rename_source_key(name, renamings, converters), name


def test_experts_are_renamed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def counting(name: str, *transforms: Any) -> tuple[str, str | None]:
        asked.append(name)
        return rename_source_key(name, *transforms)

    monkeypatch.setattr(renaming, "rename_source_key", counting)
    renamer = Renamer([WeightRenaming("mlp", "ffn")], [])
    names = [f"model.layers.{a}.mlp.experts.{b}.gate_proj.weight" for a in range(20, 30) for b in range(100, 200)]
    assert [renamer(name)[0] for name in names] == [name.replace("mlp", "ffn") for name in names]
    assert len(asked) == 1

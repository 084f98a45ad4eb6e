"""Our reading of the original compared with transformers': row O11 of the fault table."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

from leangrid.gate import original as gate_original
from leangrid.gate import side_by_side
from leangrid.machine import memory
from leangrid.models.skeleton import Skeleton
from leangrid.storage.source import open_source

Tiny = Callable[..., Path]
WINDOWS = tiny_models.tokens(4, 48)
EVERY = (*tiny_models.NAMES, *tiny_models.MIXTURES)
pytestmark = [pytest.mark.fault("O11"), pytest.mark.filterwarnings("ignore:leangrid runs without its C")]


def opened(source: Path, dtype: torch.dtype = torch.float32) -> Skeleton:
    return Skeleton(open_source(source), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", EVERY)
def test_of_a_sound_model_nothing_differs(name: str, dtype: torch.dtype, tiny: Tiny) -> None:
    ours = opened(tiny(name, dtype), dtype)
    walked = side_by_side.walk(ours, opened(tiny(name, dtype), dtype), [WINDOWS[:2].split(1)], None, "cpu")
    assert walked.errors and not any(walked.errors.values())
    with torch.no_grad(), gate_original.open_reference(ours, "cpu") as reference:
        expected = reference.outputs(WINDOWS[:2].split(1), ours.has_lm_head, "cpu", dtype)
        reference.compare(expected, side_by_side.outputs(ours, WINDOWS[:2].split(1), walked.original[0], "cpu"))
    assert reference.kind == "transformers" and reference.problems == []
    if dtype == torch.float32:
        with torch.no_grad():
            model = tiny_models.build(name)
            theirs: Any = model(WINDOWS[:2])
        wanted = theirs.logits if ours.has_lm_head else theirs.last_hidden_state
        assert torch.allclose(torch.stack(expected), wanted, atol=1e-5)


@pytest.mark.parametrize("name", ["llama3_tied", "bert", "gpt2", *tiny_models.MIXTURES])
def test_where_memory_is_short_tensors_are_compared(name: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate_original, "_spare", lambda: 0)
    sparse = name in tiny_models.MIXTURES
    # Computes in float32: transformers would have to convert every weight as it loads.
    ours = opened(tiny(name, torch.bfloat16))
    with gate_original.open_reference(ours, "cpu") as reference:
        assert reference.model is None and reference.problems == []
    assert reference.kind == ("tensors of 2 blocks" if sparse else "transformers' tensors")
    victim = f"{ours.path(ours.all_linear_names()[-1])}.weight"
    real = Skeleton.read
    monkeypatch.setattr(
        Skeleton, "read", lambda self, name: real(self, name).flip(0) if name == victim else real(self, name)
    )
    with gate_original.open_reference(ours, "cpu") as reference:
        assert reference.problems == [f"{victim} is another"]


def test_what_cannot_be_compared_is_said(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = opened(tiny("llama2"))
    with monkeypatch.context() as patch, gate_original.open_reference(ours, "cpu"):
        patch.setattr(memory, "can_map", lambda _size: False)
        with gate_original.open_reference(ours, "cpu") as reference:
            assert reference.model is None and "may not map" in reference.kind
    ours.checkpoint.remote = object()  # type: ignore[attr-defined]
    with gate_original.open_reference(ours, "cpu") as reference:
        assert reference.model is None and "not here" in reference.kind

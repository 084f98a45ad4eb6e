"""Which text that calibration did not see is measured: row O8 of the fault table."""

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
import torch

from leangrid.gate.unseen import unseen_windows
from leangrid.models.skeleton import Skeleton
from leangrid.planning.sizes import GATE_LENGTH, GATE_WINDOWS
from leangrid.storage.source import open_source

pytestmark = pytest.mark.fault("O8")


@pytest.fixture
def skeleton(tiny: Callable[..., Path]) -> Skeleton:
    return Skeleton(open_source(tiny("llama2")))


@pytest.mark.parametrize(
    ("calibration", "text"),
    [("folder/prose.txt", "other text of prose.txt"), ("embedded", "other text of the same documentation")],
)
def test_what_the_corpus_had_beyond_the_calibration_comes_first(
    calibration: str, text: str, skeleton: Skeleton
) -> None:
    more = tiny_models.tokens(2, 16)
    found = unseen_windows(skeleton, calibration, 16, more)
    assert found is not None and found.windows is more and found.text == text


def test_else_it_is_prose_that_python_carries(skeleton: Skeleton) -> None:
    found = unseen_windows(skeleton, "prose.txt", 4096, None)
    assert found is not None and found.text == "Python's documentation"
    assert found.windows.shape == (GATE_WINDOWS, GATE_LENGTH) and found.windows.dtype == torch.int64
    again = unseen_windows(skeleton, "prose.txt", 4096, None)
    assert again is not None and torch.equal(found.windows, again.windows)


def test_none_where_calibration_saw_that_prose_or_there_is_no_tokenizer(
    skeleton: Skeleton, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert unseen_windows(skeleton, "embedded", 16, None) is None
    monkeypatch.setattr("leangrid.gate.unseen.load_tokenizer", lambda _: None)
    assert unseen_windows(skeleton, "prose.txt", 16, None) is None

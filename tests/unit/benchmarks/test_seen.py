"""Which tokens count as seen by a peer's model."""

from typing import Any

import pytest
import torch


@pytest.fixture
def tokens(bench: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(torch.nn.Embedding, "forward", torch.nn.Embedding.forward)  # what Tokens replaces comes back
    return bench("seen").Tokens()


WINDOWS = torch.tensor([[1, 2, 3], [4, 5, 6], [1, 2, 3]])


def test_the_same_windows_in_any_order_and_often_are_the_same_tokens(tokens: Any) -> None:
    layer = torch.nn.Embedding(9, 2)
    for batch in (WINDOWS[1:2], WINDOWS[:1], WINDOWS[2:], WINDOWS):
        layer(batch)
    assert tokens.check(WINDOWS) == 18


@pytest.mark.parametrize(
    "seen",
    [
        [],
        [[[1, 2, 3, 0], [4, 5, 6, 0], [1, 2, 3, 0]]],  # padded
        [[[1, 2], [4, 5], [1, 2]]],  # cut
        [[[1, 2, 3], [4, 5, 6]]],  # a window less
        [[[1, 2, 3], [4, 5, 6], [4, 5, 6]]],  # another one instead
        [[[1, 2, 3], [4, 5, 7], [1, 2, 3]]],  # other tokens
        [[[1, 2, 3], [4, 5, 6], [1, 2, 3]], [[4, 5, 6]]],  # one of them once more
    ],
)
def test_other_tokens_are_noticed(tokens: Any, seen: list[list[list[int]]]) -> None:
    layer = torch.nn.Embedding(9, 2)
    for batch in seen:
        layer(torch.tensor(batch))
    with pytest.raises(RuntimeError):
        tokens.check(WINDOWS)

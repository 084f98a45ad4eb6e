"""The tensors in a call of a block."""

from types import SimpleNamespace

import pytest
import torch

from leangrid.models.calls import (
    fill,
    find_tensor,
    first_tensor,
    hidden_argument,
    moved,
    other_tensors,
    place_of,
    without_numbers,
)

X = torch.arange(12.0).view(1, 3, 4)
IDS = torch.tensor([[1, 2, 3]])


@pytest.mark.parametrize(
    ("args", "kwargs", "key"),
    [
        ((X, IDS), {}, 0),
        ((), {"attention_mask": IDS, "hidden_states": X}, "hidden_states"),
        ((None, X), {}, 1),
        ((), {"mask": torch.ones(3), "stream": X}, "stream"),
        (([X],), {"x": X}, "x"),
    ],
)
def test_hidden_states_are_found_by_place_name_or_kind(args: tuple, kwargs: dict, key: str | int) -> None:
    found, states = hidden_argument(args, kwargs)
    assert found == key and states is X


def test_a_call_without_hidden_states() -> None:
    assert hidden_argument((None, "x"), {"mask": torch.ones(3)}) == (0, None)


def test_the_other_tensors_of_a_call_are_told_by_shape_and_numbers() -> None:
    def told(**changed: object) -> dict[str, tuple[float, ...]]:
        given = {"mask": torch.eye(3), "ids": IDS, "cache": SimpleNamespace(keys=[X, X]), "tables": (X, {"a": X})}
        return other_tensors((X,), given | changed, 0)

    names = {"mask", "ids", "cache.keys[0]", "cache.keys[1]", "tables[0]", "tables[1].a"}
    assert told().keys() == names and told() == told(mask=torch.eye(3))
    assert told()["ids"] != told(ids=IDS.flip(1))["ids"], "whole numbers in another order"
    assert told()["mask"] != told(mask=torch.eye(3).flip(0))["mask"]
    infinite = torch.full((3, 3), float("-inf"))
    assert told(mask=infinite) == told(mask=infinite.clone()) and told(mask=infinite)["mask"] != told()["mask"]
    assert told(mask=torch.ones(3, 3, device="meta"))["mask"] == (3.0, 3.0)


def test_places_tell_views_from_changes() -> None:
    x = torch.randn(2, 3, 4)
    before = place_of(x)
    assert place_of(x.view(6, 4)) == before != place_of(x.view(3, 8)) and place_of(x[:1]) != before
    assert place_of(x.transpose(0, 1)) != before != place_of(x.clone())
    x.add_(1)
    assert place_of(x) != before


def test_what_a_block_returns_can_be_emptied_and_filled() -> None:
    returned = (X, None, [IDS, (X,)])
    shape = without_numbers(returned)
    assert shape[0].is_meta and shape[1] is None and shape[2][1][0].shape == X.shape
    states = torch.ones(1, 3, 4)
    filled = fill(shape, states)
    assert filled[0] is states and filled[1] is None and not filled[2][0].any() and filled[2][0].dtype == torch.int64
    assert fill(without_numbers(X), states) is states


def test_hidden_states_are_the_first_tensor_of_what_is_returned() -> None:
    assert first_tensor((X, IDS)) is X and first_tensor({"out": [X]}) is X and find_tensor((None, X)) is None
    with pytest.raises(TypeError, match="a block returned NoneType"):
        first_tensor(None)


def test_nests_are_moved_with_their_containers() -> None:
    there = moved({"a": (X, [X]), "b": "word"}, torch.device("cpu", 0))
    assert isinstance(there["a"], tuple) and isinstance(there["a"][1], list) and there["b"] == "word"
    assert torch.equal(there["a"][1][0], X)

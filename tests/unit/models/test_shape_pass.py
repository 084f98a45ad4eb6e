"""A forward pass whose weights are absent: real numbers come out, the same for the same input."""

import pytest
import torch
from torch import nn

from leangrid.models.shape_pass import ShapePass, small_parameters, storage_of


def absent(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, device="meta")


def test_a_product_with_an_absent_weight_gives_numbers_that_depend_on_its_input() -> None:
    weight, x = absent(7, 4), torch.randn(2, 3, 4)
    with torch.no_grad(), ShapePass() as looking:
        one, again, other = (nn.functional.linear(given, weight) for given in (x, x.clone(), x + 1))
    assert one.shape == (2, 3, 7) and not one.is_meta and torch.equal(one, again) and not torch.equal(one, other)
    assert one.isfinite().all() and 0.05 < float(one.std()) < 5
    assert storage_of(weight) in looking.touched


def test_a_token_s_numbers_depend_on_that_token_alone() -> None:
    weight, x = absent(8, 4), torch.randn(1, 3, 4)
    changed = x.clone()
    changed[0, 2] += 1
    with torch.no_grad(), ShapePass():
        one, other = nn.functional.linear(x, weight), nn.functional.linear(changed, weight)
    assert torch.equal(one[0, :2], other[0, :2]) and not torch.equal(one[0, 2], other[0, 2])


def test_an_absent_embedding_tells_tokens_apart() -> None:
    with torch.no_grad(), ShapePass():
        found = nn.functional.embedding(torch.tensor([[3, 4, 3]]), absent(1 << 40, 16))
    assert found.shape == (1, 3, 16) and torch.equal(found[0, 0], found[0, 2])
    assert not torch.equal(found[0, 0], found[0, 1])


def test_what_has_no_absent_operand_is_computed_and_parts_of_a_weight_stay_absent() -> None:
    weight, x = absent(6, 4), torch.randn(3, 4)
    with torch.no_grad(), ShapePass() as looking:
        assert torch.equal(x @ x.T, x.mm(x.T))
        part = weight[torch.tensor([0, 2])]
        assert part.is_meta and part.shape == (2, 4)
        whole = weight.to("cpu", torch.bfloat16)  # there is nothing that could be copied
        assert whole.is_meta and whole.dtype == torch.bfloat16
    assert storage_of(weight) in looking.touched


def test_half_precision_and_whole_numbers_keep_their_dtypes() -> None:
    with torch.no_grad(), ShapePass():
        found = nn.functional.linear(torch.randn(2, 4, dtype=torch.bfloat16), absent(3, 4).to(torch.bfloat16))
        best = (torch.randn(2, 3) + absent(2, 3)).argmax(-1)
    assert found.dtype == torch.bfloat16 and best.dtype == torch.int64 and not best.is_meta


def test_a_change_in_place_by_an_absent_tensor_changes_what_is_there() -> None:
    x = torch.ones(2, 3)
    with torch.no_grad(), ShapePass():
        given = x.mul_(absent(3))
    assert given is x and not x.is_meta and not torch.equal(x, torch.ones(2, 3))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_linear_without_columns_gets_parameters() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 0, bias=False), nn.Linear(0, 4, bias=False))
    with small_parameters(model):
        assert [tuple(p.shape) for p in model.parameters()] == [(0, 4), (4, 0)]
        assert not any(p.is_meta for p in model.parameters())

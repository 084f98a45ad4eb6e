"""The drawn gradients stand for the Fisher information: their mean is KL's second derivative."""

import pytest
import torch
from torch import Tensor

from leangrid.metrics.fisher import draw_gradients, felt_change

WIDTH, VOCABULARY, LENGTH = 5, 7, 3


def _model() -> tuple[Tensor, Tensor, Tensor]:
    """A state [1, length, width] per token, a matrix that mixes tokens causally, and a head."""
    generator = torch.Generator().manual_seed(0)
    state = torch.randn(1, LENGTH, WIDTH, generator=generator, dtype=torch.float64)
    mix = torch.randn(LENGTH, LENGTH, generator=generator, dtype=torch.float64).tril()
    return state, mix, torch.randn(WIDTH, VOCABULARY, generator=generator, dtype=torch.float64)


def _logits(state: Tensor, mix: Tensor, head: Tensor) -> Tensor:
    return torch.tanh(mix @ state) @ head


def test_what_is_felt_is_twice_the_divergence_that_a_small_change_makes() -> None:
    """Of a change at one token alone; KL is summed over that token and all later ones, which see it."""
    state, mix, head = _model()
    leaf = state.clone().requires_grad_()
    generator = torch.Generator().manual_seed(1)
    (many,) = draw_gradients(_logits(leaf, mix, head), [leaf], 4000, generator, predicts=True)
    assert many.shape == (4000, 1, LENGTH, WIDTH)
    for token in range(LENGTH):
        change = torch.zeros_like(state)
        change[0, token] = 1e-3 * torch.randn(WIDTH, generator=generator, dtype=torch.float64)
        before, after = (_logits(one, mix, head).log_softmax(-1) for one in (state, state + change))
        divergence = float((before.exp() * (before - after)).sum())
        felt = float(felt_change(change, many)) * LENGTH  # a mean over tokens, of which one changed
        assert felt == pytest.approx(2 * divergence, rel=0.1)


def test_without_predictions_it_is_the_relative_change_of_the_output() -> None:
    state, mix, _ = _model()
    leaf = state.clone().requires_grad_()
    (gradients,) = draw_gradients(mix @ leaf, [leaf], 4000, torch.Generator().manual_seed(1), predicts=False)
    change = torch.zeros_like(state)
    change[0, 1, 2] = 1e-3
    moved = (mix @ change).square().sum(-1) / (mix @ state).square().sum(-1)
    assert float(felt_change(change, gradients)) * LENGTH == pytest.approx(float(moved.sum()), rel=0.1)


def test_the_same_seed_draws_the_same_and_a_state_that_nothing_reads_gets_zeros() -> None:
    state, mix, head = _model()
    leaf, unread = state.clone().requires_grad_(), torch.zeros(1, LENGTH, WIDTH, requires_grad=True)
    both = [
        draw_gradients(_logits(leaf, mix, head), [leaf, unread], 2, torch.Generator().manual_seed(3), predicts=True)
        for _ in range(2)
    ]
    assert torch.equal(both[0][0], both[1][0])
    assert not both[0][1].any()
    assert not torch.equal(both[0][0][0], both[0][0][1])


def test_a_token_whose_change_would_be_felt_far_more_is_cut_to_what_others_feel() -> None:
    """Tokens whose outputs are not normed: the longer the state's row of the mixing matrix, the larger its gradient."""
    generator = torch.Generator().manual_seed(0)
    state = torch.randn(1, 9, WIDTH, generator=generator, dtype=torch.float64)
    share = torch.ones(9, 1, dtype=torch.float64)
    share[3] = 500  # all outputs read token 3 most
    leaf = state.clone().requires_grad_()
    output = torch.ones(9, 9, dtype=torch.float64) @ (share * leaf) + 1e4
    (found,) = draw_gradients(output, [leaf], 64, torch.Generator().manual_seed(1), predicts=False)
    sizes = (found.square().mean(0).sum(-1).sqrt() * state.norm(dim=-1))[0]
    assert float(sizes[3]) == pytest.approx(4 * float(sizes.median()), rel=0.01)
    assert float(sizes.max()) <= 4.001 * float(sizes.median())
    others = [number for number in range(9) if number != 3]
    directions = found / found.norm(dim=-1, keepdim=True)
    assert torch.allclose(directions[:, :, 3], directions[:, :, others[0]])  # its direction stays

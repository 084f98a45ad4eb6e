"""KL and agreement per token, and the three ways a reference is kept."""

import pytest
import torch

from leangrid.errors import ShapeError
from leangrid.metrics.divergence import ReferenceLogits, divergence, mean_divergence

WINDOWS = torch.randint(0, 40, (2, 300), generator=torch.Generator().manual_seed(0))


def logits_of(seed: int):
    table = torch.randn(40, 40, generator=torch.Generator().manual_seed(seed)) * 4
    calls = []

    def logits(window: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return table[window]

    return logits, calls


def by_definition(window: torch.Tensor) -> torch.Tensor:
    reference, model = (logits_of(seed)[0](window)[:-1].double().softmax(-1) for seed in (1, 2))
    return (reference * (reference / model).log()).sum(-1)


# bytes of all log-probabilities: 2 windows x 299 x 40, in float32 and in float16
@pytest.mark.parametrize(
    ("budget", "kept", "again", "exact"), [(95680, True, 0, True), (95679, True, 0, False), (47839, False, 2, True)]
)
def test_a_reference_is_kept_in_float32_or_float16_or_run_again(
    budget: int, kept: bool, again: int, exact: bool
) -> None:
    original, calls = logits_of(1)
    reference = ReferenceLogits(original, WINDOWS, budget=budget)
    assert reference.in_memory is kept and len(calls) == 2
    for index, window in enumerate(WINDOWS):
        found = divergence(reference.log_probs(index), logits_of(2)[0](window))
        torch.testing.assert_close(
            found.kl, by_definition(window), rtol=1e-4 if exact else 2e-2, atol=1e-5 if exact else 2e-3
        )
        difference = abs(found.kl.mean() - by_definition(window).mean())
        assert difference < (1e-5 if exact else 1e-3)
    assert len(calls) == 2 + again
    assert reference.nll.shape == (2 * 299,)


def test_identical_models_have_no_divergence() -> None:
    original, _ = logits_of(1)
    reference = ReferenceLogits(original, WINDOWS)
    found = divergence(reference.log_probs(0), original(WINDOWS[0]))
    assert found.kl.abs().max() == 0 and found.agrees.all()


def test_agreement_is_of_the_likeliest_token() -> None:
    reference = torch.log_softmax(torch.tensor([[3.0, 1, 2], [0, 5, 4]]), -1)
    logits = torch.tensor([[3.0, 9, 2], [1, 2, 0], [0, 0, 0]])
    assert divergence(reference, logits).agrees.tolist() == [False, True]


def test_vocabularies_must_match() -> None:
    with pytest.raises(ShapeError, match="4 against the reference's 3"):
        divergence(torch.zeros(2, 3), torch.zeros(3, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mean_divergence_and_its_gradient_are_those_of_the_definition(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(3)
    reference, logits = (torch.randn(2, 300, 40, generator=draw).to(dtype) * 3 for _ in range(2))
    logits.requires_grad_()
    exact = logits.detach().double().requires_grad_()
    p, q = reference.double().log_softmax(-1), exact.log_softmax(-1)
    wanted = (p.exp() * (p - q)).sum(-1).mean()
    found = mean_divergence(reference, logits)
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    ((found * 3).backward(), (wanted * 3).backward())
    assert logits.grad is not None and exact.grad is not None
    torch.testing.assert_close(
        logits.grad.double(), exact.grad, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-9
    )
    assert mean_divergence(reference, logits.detach()) == found.detach()

"""Perplexity against its definition."""

import math

import pytest
import torch

from leangrid.metrics.perplexity import negative_log_likelihood, perplexity


def test_nll_is_minus_the_log_probability_of_the_next_token() -> None:
    logits = torch.randn(300, 11, generator=torch.Generator().manual_seed(0)) * 3  # several chunks, the last one ragged
    tokens = torch.randint(0, 11, (300,), generator=torch.Generator().manual_seed(1))
    probabilities = torch.softmax(logits.double(), -1)
    expected = [-math.log(probabilities[i, tokens[i + 1]]) for i in range(299)]
    found = negative_log_likelihood(logits, tokens)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-6)
    assert perplexity(found) == pytest.approx(math.exp(sum(expected) / 299), rel=1e-5)
    assert perplexity(torch.tensor([1e9], dtype=torch.float64)) == math.inf

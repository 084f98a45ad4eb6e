"""States and the cosine distance of encoders."""

import pytest
import tiny_models
import torch

from leangrid.metrics.embedding import cosine_distance, mean_pooled, states


def test_the_distance_is_0_for_equal_directions_and_1_for_orthogonal_ones() -> None:
    first = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    assert cosine_distance(first, 3 * first) == pytest.approx(0.0)
    assert cosine_distance(first, first.flip(0)) == pytest.approx(1.0)
    assert cosine_distance(first, torch.stack([first[0], first[0]])) == pytest.approx(0.5)  # the mean over windows
    assert cosine_distance(first, -first) == pytest.approx(2.0)


@pytest.mark.parametrize("name", ["bert", "llama2"])
def test_states_are_those_before_the_head(name: str) -> None:
    model, ids = tiny_models.build(name), tiny_models.tokens(1, 12)
    with torch.no_grad():
        found = states(model, input_ids=ids)
        pooled = mean_pooled(model, ids[0])
        wanted = model(ids, output_hidden_states=True).hidden_states[-1]
    assert torch.allclose(found, wanted, atol=1e-6) and found.shape == (1, 12, tiny_models.HIDDEN)
    assert pooled.dtype == torch.float64 and torch.allclose(pooled, wanted[0].double().mean(0), atol=1e-6)

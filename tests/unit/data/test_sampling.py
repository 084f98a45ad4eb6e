"""data/sampling.py: the cache changes no token, the distribution is the model's, and windows are full."""

import pytest
import tiny_models
import torch

from leangrid.data.decoding import Decoder
from leangrid.data.sampling import sample_windows, stream_tokens
from leangrid.errors import CalibrationError

DECODERS = [name for name in tiny_models.NAMES if name not in tiny_models.ENCODERS]


@pytest.mark.parametrize("name", DECODERS)
def test_stepping_through_the_cache_gives_the_logits_of_the_whole(name: str) -> None:
    model = tiny_models.build(name)
    tokens = tiny_models.tokens(2, 40)  # beyond the sliding windows of 16
    with torch.no_grad():
        whole = model(input_ids=tokens).logits
        decoder = Decoder(model, 40, tokens[0, :6])
        parts = [decoder.logits(tokens[:, :20]), *(decoder.logits(tokens[:, i : i + 1]) for i in range(20, 40))]
        assert decoder.buffers is not None
    assert torch.allclose(torch.stack(parts, 1), whole[:, 19:], atol=2e-4)


def test_the_same_windows_for_a_seed_whatever_the_batch() -> None:
    model, tokenizer = tiny_models.build("llama3"), tiny_models.tokenizer()
    found = sample_windows(model, tokenizer, 5, 24, seed=3)
    assert found.shape == (5, 24) and found.dtype == torch.int64
    assert torch.equal(found, sample_windows(model, tokenizer, 5, 24, seed=3, batch=2))
    assert not torch.equal(found, sample_windows(model, tokenizer, 5, 24, seed=4))


def test_draws_follow_the_models_distribution() -> None:
    model = tiny_models.build("llama2")
    found = sample_windows(model, None, 64, 40, seed=0)
    with torch.no_grad():
        log_probs = torch.log_softmax(model(input_ids=found).logits.double(), -1)[:, :-1]
    # The mean surprise of draws is the mean entropy; greedy or uniform draws are far from it.
    surprise = -log_probs.gather(-1, found[:, 1:, None])
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    spread = surprise.std() / surprise.numel() ** 0.5
    ended = found[:, :-1] == 2  # what follows the end of a text is a fresh start, not a draw
    assert not ended.all()
    difference = (surprise[..., 0] - entropy)[~ended].mean()
    assert abs(difference) < 4 * spread
    assert abs((-log_probs).mean() - entropy.mean()) > 10 * spread  # uniform draws would be told apart


class AlwaysEnds(torch.nn.Module):
    """A model that gives all probability to the end of the text."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_models.build("llama3")
        self.config, self.generation_config = self.inner.config, self.inner.generation_config

    def forward(self, **inputs: object) -> object:
        output = self.inner(**inputs)
        output.logits = torch.full_like(output.logits, -100.0)
        output.logits[..., 2] = 100.0
        return output


def test_after_an_end_a_new_text_opens_and_the_window_stays_full() -> None:
    tokenizer = tiny_models.tokenizer()
    found = sample_windows(AlwaysEnds(), tokenizer, 3, 9)
    assert (found[:, 1::2] == 2).all()
    special = torch.tensor(tokenizer.all_special_ids)
    assert not torch.isin(found[:, ::2], special).any()  # this tokenizer has no opening token: ordinary words open
    assert len(found[:, ::2].unique()) > 3


def test_stream_is_greedy_without_temperature_and_stops() -> None:
    model = tiny_models.build("qwen3")
    prompt = tiny_models.tokens(1, 6)[0].tolist()
    expected = list(prompt)
    with torch.no_grad():
        for _ in range(8):
            expected.append(int(model(input_ids=torch.tensor([expected])).logits[0, -1].argmax()))
    reply = expected[6:]
    assert list(stream_tokens(model, prompt, 8)) == reply
    stop = reply[5]
    assert list(stream_tokens(model, prompt, 8, stop={stop})) == reply[: reply.index(stop)]
    drawn = [list(stream_tokens(model, prompt, 8, temperature=1.0, seed=seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_encoders_and_long_windows_are_refused() -> None:
    with pytest.raises(CalibrationError, match="encoder"):
        sample_windows(tiny_models.build("bert"), None, 2, 8)
    with pytest.raises(CalibrationError, match="512"):
        sample_windows(tiny_models.build("llama3"), None, 1, 513)

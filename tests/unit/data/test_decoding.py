"""data/decoding.py: token by token as in one pass over all tokens, whatever a model keeps of those before."""

import pytest
import tiny_models
import torch
import zoo_models
from torch import Tensor, nn

from leangrid.data.decoding import BufferedLayer, Decoder
from leangrid.data.sampling import sample_windows, stream_tokens
from leangrid.errors import CalibrationError

# They keep keys and values; those and states of a state space or a convolution; states alone.
KEEP = ["gpt_oss", "gemma4_text", "gemma3n_text", "deepseek_v3", "cohere2", "qwen3_5_text", "falcon_h1", "lfm2"]
KEEP += ["qwen3_next", "jamba", "nemotron_h", "kimi_linear", "mamba2", "minimax"]
# Nothing; what has another batch's shape; or, in so small a model, other columns than a pass over all tokens has.
DO_NOT = ["openai-gpt", "rwkv", "recurrent_gemma", "cpmant", "xlnet", "deepseek_v32"]


def _whole(model: nn.Module, ids: Tensor, positions: range) -> Tensor:
    """The logits of these positions, each from a pass over the tokens up to it."""
    return torch.stack([model(input_ids=ids[:, : at + 1]).logits[:, -1].float() for at in positions], 1)


@pytest.mark.parametrize("model_type", KEEP + DO_NOT)
@torch.no_grad()
def test_every_kind_says_what_it_says_to_all_tokens_at_once(model_type: str) -> None:
    model = zoo_models.build(model_type, "causal").float().eval()
    ids = zoo_models.tokens(2, 20, config=model.config)
    decoder = Decoder(model, 20, ids[1])
    for _ in range(2):  # again after a restart, with another batch
        found = [decoder.logits(ids[:, :8]), *(decoder.logits(ids[:, at : at + 1]) for at in range(8, 20))]
        whole = _whole(model, ids, range(7, 20))
        assert float((torch.stack(found, 1) - whole).norm() / whole.norm()) < 1e-3
        ids = ids.flip(0)[:1]
        decoder.restart()
    assert (decoder._way == decoder._from_the_start) == (model_type in DO_NOT)


def test_what_is_drawn_from_a_hybrid_is_what_whole_passes_give() -> None:
    model = zoo_models.build("qwen3_5_text", "causal").float().eval()
    prompt = zoo_models.tokens(1, 5, config=model.config)[0].tolist()
    expected = list(prompt)
    with torch.no_grad():
        for _ in range(6):
            expected.append(int(model(input_ids=torch.tensor([expected])).logits[0, -1].argmax()))
    assert list(stream_tokens(model, prompt, 6)) == expected[5:]
    drawn = sample_windows(model, None, 3, 16, seed=2)
    assert drawn.shape == (3, 16) and torch.equal(drawn, sample_windows(model, None, 3, 16, seed=2, batch=1))


def test_a_prompt_of_one_token_is_enough() -> None:
    model = zoo_models.build("openai-gpt", "causal").float().eval()  # which takes a cache, and does not look at it
    expected = [5]
    with torch.no_grad():
        for _ in range(4):
            expected.append(int(model(input_ids=torch.tensor([expected])).logits[0, -1].argmax()))
    assert list(stream_tokens(model, [5], 4)) == expected[1:]


def test_buffers_grow_where_a_model_keeps_more_than_was_said() -> None:
    layer, keys = BufferedLayer(4), torch.randn(1, 2, 11, 3)
    layer.update(keys[:, :, :3], keys[:, :, :3])
    assert layer.key_buffer.shape[-2] == 4
    layer.update(keys[:, :, 3:10], keys[:, :, 3:10])
    found, _ = layer.update(keys[:, :, 10:], keys[:, :, 10:])
    assert torch.equal(found, keys) and layer.get_seq_length() == 11


def test_memory_that_runs_out_is_no_other_way() -> None:
    model = tiny_models.build("llama3")
    model.forward = _no_memory
    with pytest.raises(torch.OutOfMemoryError):
        Decoder(model, 8, torch.arange(4))


def _no_memory(input_ids: Tensor, **_: object) -> None:
    raise torch.OutOfMemoryError("no memory")


def test_a_model_that_needs_more_than_text_is_refused_by_name() -> None:
    with pytest.raises(CalibrationError, match=r"says nothing to text alone: .*BlipForConditionalGeneration"):
        sample_windows(zoo_models.build("blip", "image-text").eval(), None, 1, 8)

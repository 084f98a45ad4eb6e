"""One native call a token gives the logits and the cache of the model's own forward pass."""

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
import torch
import transformers as hf
from quantized_checkpoints import write
from torch import Tensor

import leangrid
from leangrid.data.decoding import Decoder
from leangrid.data.sampling import stream_tokens
from leangrid.inference.native_step import native_step

PLAIN = ["llama1", "llama2", "llama3", "llama3_tied", "qwen2", "qwen3"]


def prompted(model: torch.nn.Module, tokens: Tensor, capacity: int) -> tuple[list[Tensor], list[Tensor]]:
    """The cache after ``tokens``, as ``stream`` hands it over."""
    with torch.no_grad():
        decoder = Decoder(model, capacity, tokens[0, :4])
        decoder.logits(tokens)
    assert decoder.buffers is not None
    return decoder.buffers


def same_as_the_model(model: torch.nn.Module) -> None:
    tokens = tiny_models.tokens(1, 40) % (model.config.vocab_size - 4)
    keys, values = prompted(model, tokens[:, :20], 40)
    whole_keys, whole_values = prompted(model, tokens, 40)
    step = native_step(model, keys, values)
    assert step is not None
    with torch.no_grad():
        logits = model(input_ids=tokens).logits[0]
    for position in range(20, 40):
        torch.testing.assert_close(step(int(tokens[0, position]), position), logits[position], rtol=1e-4, atol=2e-4)
    for found, whole in zip([*keys, *values], [*whole_keys, *whole_values], strict=True):
        torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", PLAIN)
def test_dense_models_step_as_they_run(isa: str, name: str) -> None:
    same_as_the_model(tiny_models.build(name))


def test_mistral_without_its_window(isa: str) -> None:
    model = tiny_models.build("mistral")
    assert native_step(model, *prompted(model, tiny_models.tokens(1, 4), 17)) is None  # its window is 16
    assert native_step(model, *prompted(model, tiny_models.tokens(1, 4), 16)) is not None
    model.config.sliding_window = None
    same_as_the_model(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes_that_are_no_multiple_of_a_vector(isa: str, tmp_path: Path, dtype: torch.dtype) -> None:
    sizes = {
        "hidden_size": 40,
        "intermediate_size": 72,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 10,
    }
    config = hf.LlamaConfig(
        vocab_size=tiny_models.VOCAB - 1, num_hidden_layers=3, initializer_range=0.1, pad_token_id=0, **sizes
    )
    source = hf.LlamaForCausalLM(config).to(dtype).eval()
    if dtype == torch.float32:
        same_as_the_model(source)
    source.save_pretrained(tmp_path / "source")
    write(tmp_path / "source", tmp_path / "out", "NU3")
    same_as_the_model(leangrid.load(tmp_path / "out", dtype=torch.float32)[0])


@pytest.mark.parametrize("scheme", ["NU4", "NU3", "W4A16_G32", "W8A16", "W3A16_G16_SYM"])
@pytest.mark.parametrize("name", ["llama3_tied", "qwen3"])
def test_results_step_as_they_run(isa: str, tiny: Callable[..., Path], tmp_path: Path, name: str, scheme: str) -> None:
    write(tiny(name, torch.bfloat16), tmp_path / "out", scheme)
    model, _ = leangrid.load(tmp_path / "out", dtype=torch.float32)
    same_as_the_model(model)


def test_threads_change_nothing(isa: str) -> None:
    model = tiny_models.build("llama3")
    tokens, found, before = tiny_models.tokens(1, 8), [], torch.get_num_threads()
    for threads in (1, 2, 3):
        keys, values = prompted(model, tokens, 10)
        try:
            torch.set_num_threads(threads)
            step = native_step(model, keys, values)
            assert step is not None
            found.append(torch.cat([step(7, 8), step(9, 9), keys[1].flatten()]))
        finally:
            torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_what_it_does_not_know_is_left_to_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("gemma2", "phi3", "gpt2", "opt"):
        model = tiny_models.build(name)
        assert native_step(model, *prompted(model, tiny_models.tokens(1, 4), 8)) is None, name
    model = tiny_models.build("llama3")
    cache = prompted(model, tiny_models.tokens(1, 4), 8)
    assert native_step(tiny_models.build("llama3", torch.bfloat16), *cache) is None
    model.model.layers[1].mlp.up_proj = torch.nn.Sequential(model.model.layers[1].mlp.up_proj)
    assert native_step(model, *cache) is None
    monkeypatch.setenv("LEANGRID_KERNELS", "torch")
    assert native_step(tiny_models.build("llama3"), *cache) is None


@pytest.mark.parametrize("name", ["llama3", "qwen3", "gpt2"])
def test_stream_says_the_same_by_either_way(name: str) -> None:
    model, prompt = tiny_models.build(name), tiny_models.tokens(1, 6)[0].tolist()
    for settings in ({}, {"temperature": 1.0, "seed": 3}):
        native_way = list(stream_tokens(model, prompt, 12, native_step=native_step, **settings))
        assert native_way == list(stream_tokens(model, prompt, 12, **settings)) and len(native_way) == 12

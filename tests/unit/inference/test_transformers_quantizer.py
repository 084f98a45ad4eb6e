"""inference/transformers_quantizer.py: transformers makes our layers where a checkpoint stores codes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
import torch
import transformers as hf
import zoo_models
from quantized_checkpoints import Made, answer, auto, make_once, reference
from safetensors.torch import load_file

import leangrid
from leangrid.inference.layers import LutLinear, PackedLinear
from leangrid.models.result_reader import ResultReader


@pytest.fixture(scope="module")
def made(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_once(tiny, tmp_path_factory)


def test_tied_embeddings_stay_tied_and_the_head_dense(made: Made) -> None:
    for scheme in ("NU3", "W4A16_G64"):
        _, out, _ = made("llama3_tied", scheme)
        for model in (leangrid.load(out)[0], auto(out)):
            assert type(model.lm_head) is torch.nn.Linear and model.lm_head.weight is model.model.embed_tokens.weight
        assert "lm_head.weight" not in load_file(out / "model.safetensors")


def test_a_base_model_opens_a_result_of_its_causal_model(made: Made) -> None:
    source, out, dense = made("llama2", "NU3")
    base = hf.AutoModel.from_pretrained(out)
    assert isinstance(base.layers[0].mlp.up_proj, LutLinear)
    assert torch.equal(answer(base, tiny_models.tokens()), answer(reference(source, dense).model, tiny_models.tokens()))


@pytest.mark.parametrize("scheme", ["NU3", "W4A16_G64"])
def test_saved_again_it_is_the_same_result(made: Made, scheme: str, tmp_path: Path) -> None:
    _, out, _ = made("llama3_tied", scheme)
    model, _ = leangrid.load(out)
    model.save_pretrained(tmp_path / "again")
    before, after = load_file(out / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert sorted(before) == sorted(after) and all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(
        answer(leangrid.load(tmp_path / "again")[0], tiny_models.tokens()), answer(model, tiny_models.tokens())
    )


def test_llama_cpp_blocks_become_plain_linears(tiny: Callable[..., Path], tmp_path: Path) -> None:
    blocks, recipe = tmp_path / "out", leangrid.Recipe(scheme="RTN_Q4_0")
    leangrid.quantize(tiny("llama2"), blocks, recipe, windows=tiny_models.tokens(2, 16))
    (ours, _), theirs, tokens = leangrid.load(blocks), auto(blocks), tiny_models.tokens()
    assert type(theirs.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert torch.equal(answer(theirs, tokens), answer(ours, tokens))


@pytest.mark.parametrize("way", [{"scheme": "RTN4_G32", "format": "awq"}, {"scheme": "RTN_Q4_0"}])
def test_a_model_that_asks_its_linears_for_a_weight_while_it_is_loaded(way: dict[str, str], tmp_path: Path) -> None:
    """Mamba 2 initialises a weight of its output linear by its name, whatever its file holds."""
    zoo_models.save(zoo_models.build("mamba2", "causal"), tmp_path / "source")
    leangrid.quantize(tmp_path / "source", tmp_path / "out", leangrid.Recipe(**way), windows=tiny_models.tokens(2, 16))
    (ours, _), finished = leangrid.load(tmp_path / "out"), ResultReader.verified(tmp_path / "out")
    assert "backbone.layers.0.mixer.out_proj" in finished.layers
    for name in finished.layers:
        layer = ours.get_submodule(name)
        weight = layer.weight_hat if isinstance(layer, PackedLinear) else layer.weight
        assert torch.equal(weight, finished.weight_in_model_dtype(name)), name

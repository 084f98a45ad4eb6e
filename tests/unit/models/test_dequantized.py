"""Sources in fewer bits than 16 opened by transformers from tensors that are dequantized as it asks for them."""

from pathlib import Path

import quantized_sources
import tiny_models
import torch
import transformers as hf
from quantized_sources import KINDS, store_linears
from torch import Tensor

from leangrid.models.dequantized import is_dequantized, lazy_state_dict
from leangrid.storage.source import open_source


def test_transformers_loads_what_is_dequantized_when_it_asks(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)

    def store(name: str, weight: Tensor) -> dict[str, Tensor]:
        made = KINDS["modelopt-nvfp4"].make(*weight.shape, generator).tensors
        return {name.removesuffix("weight") + end: tensor for end, tensor in made.items()}

    plain = tiny_models.save("llama3", tmp_path / "plain", torch.bfloat16)
    source = store_linears(plain, tmp_path / "source", KINDS["modelopt-nvfp4"].entry, store)
    assert not is_dequantized(open_source(plain)) and not is_dequantized(None)
    with open_source(source) as checkpoint:
        assert is_dequantized(checkpoint)
        config = hf.LlamaConfig.from_dict(checkpoint.config)
        model, info = hf.LlamaForCausalLM.from_pretrained(
            None, config=config, state_dict=lazy_state_dict(checkpoint), dtype="auto", output_loading_info=True
        )
        assert not info["missing_keys"] and not info["unexpected_keys"]
        for name in checkpoint.tensors:
            assert torch.equal(model.state_dict()[name], checkpoint.read(name)), name


def test_a_lazy_tensor_has_shape_and_dtype_before_it_is_read(tmp_path: Path) -> None:
    made = quantized_sources.write(tmp_path / "source", "fp8-blocks")
    lazy = lazy_state_dict(open_source(tmp_path / "source"))["a.weight"]
    assert lazy.shape == (96, 64) and lazy.dtype == torch.bfloat16
    expected = made["a"].values.float().bfloat16()
    assert torch.equal(lazy[...], expected) and torch.equal(lazy[3:5], expected[3:5])

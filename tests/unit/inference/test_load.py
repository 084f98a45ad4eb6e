"""inference/load.py: a result answers as the dense dequantized model does, or is refused aloud."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
import torch
import transformers as hf
from quantized_checkpoints import Made, answer, make_once, reference
from quantized_sources import KINDS, store_linears
from safetensors.torch import load_file, save_file
from torch import Tensor

import leangrid
from leangrid.errors import ArchitectureError, CheckpointError, FormatError
from leangrid.inference.layers import AffineLinear, LutLinear, PackedLinear


@pytest.fixture(scope="module")
def made(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_once(tiny, tmp_path_factory)


@pytest.mark.parametrize(
    ("model", "scheme"),
    [*((m, "NU3") for m in tiny_models.NAMES), ("llama2", "W4A16_G64"), ("phi3", "W3A16"), ("bert", "NU4")],
)
def test_load_equals_the_dense_model(made: Made, model: str, scheme: str) -> None:
    source, out, dense = made(model, scheme, torch.bfloat16)
    loaded, tokenizer = leangrid.load(out)
    kind = LutLinear if scheme.startswith("NU") else AffineLinear
    assert {name for name, module in loaded.named_modules() if isinstance(module, kind)} == set(dense)
    assert tokenizer is not None and not loaded.training and loaded.dtype == torch.bfloat16
    tokens = tiny_models.tokens(2, 32)  # fewer than 33 are summed in another order: unit/kernels/test_packed.py
    expected = answer(reference(source, dense), tokens)
    assert torch.equal(answer(loaded, tokens), expected)
    unpacked, _ = leangrid.load(out, dense=True)
    assert not any(isinstance(module, PackedLinear) for module in unpacked.modules())
    assert torch.equal(answer(unpacked, tokens), expected)


def test_dtype_of_loading(made: Made) -> None:
    _, out, dense = made("llama2", "NU3", torch.bfloat16)
    wide, _ = leangrid.load(out, dtype=torch.float32)
    for name, weight in dense.items():
        assert torch.equal(wide.get_submodule(name).weight_hat, weight.float())


def test_generation_with_a_cache_is_the_dense_models(made: Made) -> None:
    source, out, dense = made("llama3", "NU4")
    prompt = tiny_models.tokens(1, 8)
    texts = [
        m.generate(prompt, max_new_tokens=8, do_sample=False) for m in (leangrid.load(out)[0], reference(source, dense))
    ]
    assert torch.equal(*texts)


def _edit(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def damage(out: Path) -> None:
        tensors = load_file(out / "model.safetensors")
        change(tensors)
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})

    return damage


def _config(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def damage(out: Path) -> None:
        config = json.loads((out / "config.json").read_text())
        change(config)
        (out / "config.json").write_text(json.dumps(config))

    return damage


UP = "model.layers.1.mlp.up_proj"


DAMAGE = {
    "lut missing": ("NU3", _edit(lambda t: t.pop(f"{UP}.lut")), f"{UP}.lut"),
    "codes missing": ("NU3", _edit(lambda t: t.pop(f"{UP}.weight")), f"{UP}.weight"),
    "extra": ("NU3", _edit(lambda t: t.update({f"{UP}.g_idx": torch.zeros(2)})), "g_idx"),
    "lut shape": ("NU3", _edit(lambda t: t.update({f"{UP}.lut": t[f"{UP}.lut"][:, :4].contiguous()})), f"{UP}.lut"),
    "lut dtype": ("NU3", _edit(lambda t: t.update({f"{UP}.lut": t[f"{UP}.lut"].int()})), f"{UP}.lut"),
    "NaN level": ("NU3", _edit(lambda t: t[f"{UP}.lut"][3, 1].fill_(float("nan"))), "NaN"),
    "order of levels": ("NU3", _edit(lambda t: t[f"{UP}.lut"][3].copy_(t[f"{UP}.lut"][3].flip(0))), "ascending"),
    "other bits": ("NU3", _config(lambda c: c["quantization_config"].update(bits=4)), UP.replace("1", "0")[:12]),
    "lost layer": (
        "NU3",
        _config(lambda c: c["quantization_config"]["layers"].append("model.layers.9.x")),
        r"model\.layers\.9\.x",
    ),
    "norm missing": ("NU3", _edit(lambda t: t.pop("model.norm.weight")), "model.norm.weight"),
    "NaN scale": ("W4A16_G64", _edit(lambda t: t[f"{UP}.weight_scale"][0, 0].fill_(float("nan"))), "NaN"),
    "zero points missing": ("W4A16_G64", _edit(lambda t: t.pop(f"{UP}.weight_zero_point")), "weight_zero_point"),
    "packed shape": (
        "W4A16_G64",
        _edit(lambda t: t.update({f"{UP}.weight_packed": t[f"{UP}.weight_packed"][:-1].contiguous()})),
        UP,
    ),
    "shape lies": ("W4A16_G64", _edit(lambda t: t[f"{UP}.weight_shape"].fill_(7)), "weight_shape"),
    "truncated": ("NU3", lambda out: os.truncate(out / "model.safetensors", 5000), r"model\.safetensors"),
    "no config": ("NU3", lambda out: (out / "config.json").unlink(), "config.json"),
    "broken config": ("NU3", lambda out: (out / "config.json").write_text("{"), "config.json"),
}


@pytest.mark.fault("O5")
@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_result_is_refused_before_it_runs(made: Made, case: str, tmp_path: Path) -> None:
    scheme, damage, words = DAMAGE[case]
    out = shutil.copytree(made("llama2", scheme)[1], tmp_path / "out")
    damage(out)
    with pytest.raises(CheckpointError, match=words):
        leangrid.load(out)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda c: c.update(architectures=["os"]), ArchitectureError, "'os'"),
        (lambda c: c.update(model_type="nonsense"), ArchitectureError, "nonsense"),
        (lambda c: c["quantization_config"].update(quant_method="gptq"), FormatError, "gptq"),
        (lambda c: c["quantization_config"].update(version=99), FormatError, "99"),
        (lambda c: c.update(quantization_config=[1]), CheckpointError, "object"),
    ],
)
def test_what_is_not_ours_to_load_is_refused_by_name(
    made: Made, change: Callable, error: type, words: str, tmp_path: Path
) -> None:
    out = shutil.copytree(made("llama2", "NU3")[1], tmp_path / "out")
    _config(change)(out)
    with pytest.raises(error, match=words):
        leangrid.load(out)


def test_an_unfinished_run_says_how_to_finish(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    with pytest.raises(CheckpointError, match="same quantize command"):
        leangrid.load(tmp_path / "out")


def test_a_plain_checkpoint_loads_as_it_is(tiny: Callable[..., Path]) -> None:
    model, tokenizer = leangrid.load(tiny("llama2"))
    expected = hf.AutoModelForCausalLM.from_pretrained(tiny("llama2"))
    assert tokenizer is not None and torch.equal(
        answer(model, tiny_models.tokens()), answer(expected, tiny_models.tokens())
    )


def test_three_bits_as_older_compressed_tensors_packed_them_open_dense(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    kind, generator = KINDS["ct-int3-holes"], torch.Generator().manual_seed(0)
    wanted: dict[str, torch.Tensor] = {}

    def store(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        made = kind.make(*weight.shape, generator)
        wanted[name] = made.values.float()
        return {f"{name.removesuffix('.weight')}.{end}": tensor for end, tensor in made.tensors.items()}

    store_linears(tiny("llama3"), tmp_path / "theirs", kind.entry, store)
    model, _ = leangrid.load(tmp_path / "theirs", dtype=torch.float32)
    assert wanted and all(torch.equal(model.get_parameter(name), tensor) for name, tensor in wanted.items())

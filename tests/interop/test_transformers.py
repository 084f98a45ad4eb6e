"""Finished directories in plain transformers: equal to the dense dequantized model, or refused aloud."""

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
import torch
import transformers as hf
from quantized_checkpoints import Made, answer, auto, make_once, reference, write
from run_python import run_python

import leangrid

pytestmark = pytest.mark.interop

AFFINE = ["W4A16_G64", "W3A16", "W2A16_G16", "W8A16", "W6A16_G64", "W5A16_SYM", "W4A16_SYM", "W3A16_G32_SYM"]


@pytest.fixture(scope="module")
def made(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_once(tiny, tmp_path_factory)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", AFFINE)
@pytest.mark.parametrize("model", ["llama3_tied", "bert"])
def test_affine_results_open_in_plain_transformers(made: Made, model: str, scheme: str, dtype: torch.dtype) -> None:
    source, out, dense = made(model, scheme, dtype)
    loaded = auto(out)
    for name, weight in dense.items():
        read = loaded.get_submodule(name).weight
        assert read.dtype == dtype and torch.equal(read, weight), name
    tokens = tiny_models.tokens(2, 16)
    assert torch.equal(answer(loaded, tokens), answer(reference(source, dense), tokens))


@pytest.mark.parametrize("scheme", ["W4A16_G32", "W4A16", "W3A16_SYM", "NU3"])
def test_computed_in_float32_the_weights_are_still_those_of_the_file(made: Made, scheme: str) -> None:
    """A bfloat16 result in float32: S (q - Z) is rounded to bfloat16 first, here and in transformers alike."""
    _, out, dense = made("llama2", scheme, torch.bfloat16)
    ours, _ = leangrid.load(out, dtype=torch.float32)
    theirs = hf.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    for name, weight in dense.items():
        assert torch.equal(ours.get_submodule(name).weight_hat, weight.float()), name
        if not scheme.startswith("NU"):
            assert torch.equal(theirs.get_submodule(name).weight, weight.float()), name
    tokens = tiny_models.tokens(2, 16)
    torch.testing.assert_close(answer(ours, tokens), answer(theirs, tokens), rtol=1e-5, atol=1e-5)


REFUSED = """
import sys
from transformers import AutoModelForCausalLM
for directory in sys.argv[1:]:
    for more in ({}, {"device_map": "cpu"}):
        try:
            AutoModelForCausalLM.from_pretrained(directory, **more)
            print("loaded")
        except Exception as error:
            print(type(error).__name__, str(error).splitlines()[0])
assert "leangrid" not in sys.modules
"""


@pytest.fixture(scope="module")
def blocks(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result in llama.cpp's blocks."""
    out = tmp_path_factory.mktemp("blocks") / "out"
    leangrid.quantize(tiny("llama2"), out, leangrid.Recipe(scheme="RTN_Q4_0"), windows=tiny_models.tokens(2, 16))
    return out


def test_without_leangrid_no_result_is_ever_loaded_wrong(
    made: Made, blocks: Path, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """Every container that transformers does not know by itself: an error each, and it never begins to answer from
    random weights."""
    leangrid.export(blocks, tmp_path / "file", to="gguf")
    write(tiny("llama2"), tmp_path / "mlx", "W4A16_G32", "mlx")
    done = run_python(REFUSED, made("llama2", "NU3")[1], blocks, tmp_path / "file", tmp_path / "mlx", path=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lut, packed, file, mlx = (pair for pair in zip(*[iter(done.stdout.splitlines())] * 2, strict=True))
    assert (
        all(line.startswith("RuntimeError") for line in (*lut, *packed)) and "leangrid" in done.stderr
    )  # the unknown method, by name
    assert done.stderr.count("MISMATCH") >= 4  # the report of shapes
    assert all(
        line.startswith("ValueError") and "config.json" in line for line in file
    )  # there is none: nothing begins
    assert all(line.startswith("ValueError") and "quant_method" in line for line in mlx)

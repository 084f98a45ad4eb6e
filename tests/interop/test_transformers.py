"""Finished directories, opened by transformers and by ``leangrid.load``: equal to the dense dequantized model, or
refused aloud."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
import torch
import transformers as hf
from quantized_checkpoints import answer, reference, write
from safetensors.torch import load_file, save_file
from torch import Tensor

import leangrid
from leangrid.errors import ArchitectureError, CheckpointError, FormatError
from leangrid.inference.layers import AffineLinear, LutLinear, PackedLinear

pytestmark = pytest.mark.interop

SRC = Path(leangrid.__file__).parents[1]
AFFINE = ["W4A16_G64", "W3A16", "W2A16_G16", "W8A16", "W6A16_G64", "W5A16_SYM", "W4A16_SYM", "W3A16_G32_SYM"]
Made = Callable[..., tuple[Path, Path, dict[str, Tensor]]]


@pytest.fixture(scope="module")
def made(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Made:
    """``made(model, scheme, dtype)`` -> (source, result, dense weights), each made once."""
    done: dict[tuple, tuple[Path, Path, dict[str, Tensor]]] = {}

    def result(model: str, scheme: str, dtype: torch.dtype = torch.float32) -> tuple[Path, Path, dict[str, Tensor]]:
        key = (model, scheme, dtype)
        if key not in done:
            source, out = tiny(model, dtype), tmp_path_factory.mktemp("results") / "out"
            done[key] = (source, out, write(source, out, scheme))
        return done[key]

    return result


def auto(result: Path) -> hf.PreTrainedModel:
    encoder = json.loads((result / "config.json").read_text())["model_type"] in tiny_models.ENCODERS
    return (hf.AutoModel if encoder else hf.AutoModelForCausalLM).from_pretrained(result)


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
    tokens = tiny_models.tokens(2, 32)  # fewer than 33 are summed in another order: tests/unit/test_decode.py
    expected = answer(reference(source, dense), tokens)
    assert torch.equal(answer(loaded, tokens), expected)
    unpacked, _ = leangrid.load(out, dense=True)
    assert not any(isinstance(module, PackedLinear) for module in unpacked.modules())
    assert torch.equal(answer(unpacked, tokens), expected)


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


def test_tied_embeddings_stay_tied_and_the_head_dense(made: Made) -> None:
    for scheme in ("NU3", "W4A16_G64"):
        _, out, _ = made("llama3_tied", scheme)
        for model in (leangrid.load(out)[0], auto(out)):
            assert type(model.lm_head) is torch.nn.Linear and model.lm_head.weight is model.model.embed_tokens.weight
        assert "lm_head.weight" not in load_file(out / "model.safetensors")


def test_dtype_of_loading(made: Made) -> None:
    _, out, dense = made("llama2", "NU3", torch.bfloat16)
    wide, _ = leangrid.load(out, dtype=torch.float32)
    for name, weight in dense.items():
        assert torch.equal(wide.get_submodule(name).weight_hat, weight.float())


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


def test_generation_with_a_cache_is_the_dense_models(made: Made) -> None:
    source, out, dense = made("llama3", "NU4")
    prompt = tiny_models.tokens(1, 8)
    texts = [
        m.generate(prompt, max_new_tokens=8, do_sample=False) for m in (leangrid.load(out)[0], reference(source, dense))
    ]
    assert torch.equal(*texts)


def python(code: str, *args: object, path: bool = True) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(SRC) if path else "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], env=env, capture_output=True, text=True, timeout=120, check=False
    )


OPEN = "m = AutoModelForCausalLM.from_pretrained(sys.argv[1]); print(type(m.model.layers[0].mlp.up_proj).__name__)"


@pytest.mark.parametrize(
    "imports",
    [
        "import leangrid; from transformers import AutoModelForCausalLM",
        "import leangrid.inference.transformers_quantizer; from transformers import AutoModelForCausalLM",
        pytest.param("from transformers import AutoModelForCausalLM; import leangrid", marks=pytest.mark.slow),
        pytest.param(
            "import transformers.quantizers.auto; import leangrid; from transformers import AutoModelForCausalLM",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_import_leangrid_is_enough_in_either_order(made: Made, imports: str) -> None:
    done = python(f"import sys; {imports}; {OPEN}", made("llama2", "NU3")[1])
    assert done.returncode == 0 and done.stdout.split() == ["LutLinear"], done.stderr[-2000:]


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


def test_with_leangrid_transformers_opens_blocks(blocks: Path) -> None:
    (ours, _), theirs, tokens = leangrid.load(blocks), auto(blocks), tiny_models.tokens()
    assert type(theirs.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert torch.equal(answer(theirs, tokens), answer(ours, tokens))


def test_without_leangrid_no_result_is_ever_loaded_wrong(
    made: Made, blocks: Path, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """Every container that transformers does not know by itself: an error each, and it never begins to answer from
    random weights."""
    leangrid.export(blocks, tmp_path / "file", to="gguf")
    write(tiny("llama2"), tmp_path / "mlx", "W4A16_G32", "mlx")
    done = python(REFUSED, made("llama2", "NU3")[1], blocks, tmp_path / "file", tmp_path / "mlx", path=False)
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


def test_import_leangrid_stays_light() -> None:
    heavy = ["torch", "transformers", "triton", "matplotlib", "numpy", "compressed_tensors"]
    done = python(f"import sys, leangrid; print([m for m in {heavy} if m in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr


def test_public_names_stay_functions_after_their_files_are_imported() -> None:
    import leangrid.inference.load

    assert callable(leangrid.load) and leangrid.load.__name__ == "load"
    with pytest.raises(AttributeError, match="no_such_name"):
        leangrid.no_such_name  # noqa: B018


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

"""Several schemes in one model: each layer as the recipe says, in our reader, in the library's, and in transformers
where it can."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
import torch
import transformers as hf
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import match_targets
from safetensors.torch import load_file

import leangrid
from leangrid.errors import FormatError, RecipeError
from leangrid.exporters.export import export
from leangrid.models.result_reader import ResultReader
from leangrid.recipe import Recipe

pytestmark = pytest.mark.interop
LAYERS = {"mlp.down_proj": "W8A16_G32", r"re:model\.layers\.0\.self_attn\.[qkv]_proj": "W3A16"}
EXPECTED = {
    "model.layers.1.mlp.down_proj": "W8A16_G32",
    "model.layers.0.self_attn.k_proj": "W3A16",
    "model.layers.1.self_attn.k_proj": "W4A16_G32",
}
Made = Callable[[str], Path]


@pytest.fixture(scope="module")
def mixed(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Made:
    """``mixed("")`` or ``mixed("_SYM")`` -> a finished bfloat16 result with three schemes."""
    made: dict[str, Path] = {}

    def result(suffix: str) -> Path:
        if suffix not in made:
            recipe = Recipe(scheme="W4A16_G32" + suffix, layers={k: v + suffix for k, v in LAYERS.items()}, steps=64)
            made[suffix] = tmp_path_factory.mktemp("mixed") / "out"
            leangrid.quantize(tiny("llama2", torch.bfloat16), made[suffix], recipe, windows=tiny_models.tokens(2, 16))
        return made[suffix]

    return result


@pytest.mark.parametrize("suffix", ["", pytest.param("_SYM", marks=pytest.mark.slow)])
def test_each_layer_has_its_scheme_everywhere(
    mixed: Made, tiny: Callable[..., Path], suffix: str, tmp_path: Path
) -> None:
    out = mixed(suffix)
    finished = ResultReader.verified(out)
    records = {r["name"]: r["scheme"] for r in map(json.loads, (out / "records.jsonl").read_text().splitlines())}
    for name, scheme in EXPECTED.items():
        assert records[name] == scheme + suffix and finished.schemes[name] == leangrid.Scheme.parse(scheme + suffix)
    bits = {name: finished.layer(name)[1].bits for name in finished.layers}
    assert {bits[name] for name in EXPECTED} == {8, 3, 4}
    recipe = Recipe(scheme="W4A16_G32" + suffix, layers={k: v + suffix for k, v in LAYERS.items()}, steps=64)
    stated = json.loads((out / "manifest.json").read_text())["result"]["bits_per_weight"]
    assert leangrid.plan(tiny("llama2", torch.bfloat16), recipe).bits_per_weight == pytest.approx(stated, abs=1e-3)

    export(out, tmp_path / "dense", to="dense")
    export(out, tmp_path / "again", to="compressed-tensors")
    tokens = tiny_models.tokens(2, 40)
    with torch.no_grad():
        expected = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")(tokens).logits
        for directory in (out, tmp_path / "again"):
            assert torch.equal(leangrid.load(directory)[0](tokens).logits, expected)


@pytest.mark.parametrize("suffix", ["", "_SYM"])
def test_the_library_reads_each_layer_by_its_group(mixed: Made, suffix: str) -> None:
    out = mixed(suffix)
    finished, tensors = ResultReader.verified(out), load_file(out / "model.safetensors")
    groups = QuantizationConfig.model_validate(
        json.loads((out / "config.json").read_text())["quantization_config"]
    ).config_groups
    assert len(groups) == 3
    for name in finished.layers:
        found = [group for group in groups.values() if match_targets(name, torch.nn.Linear(1, 1), group.targets)]
        assert len(found) == 1, name
        stored = {k.rpartition(".")[2]: v for k, v in tensors.items() if k.rpartition(".")[0] == name}
        read = BaseCompressor.get_value_from_registry("pack-quantized").decompress(stored, found[0])["weight"]
        assert torch.equal(read, finished.weight_in_model_dtype(name)), name


def test_transformers_reads_symmetric_mixtures(mixed: Made) -> None:
    loaded, finished = hf.AutoModelForCausalLM.from_pretrained(mixed("_SYM")), ResultReader.verified(mixed("_SYM"))
    tokens = tiny_models.tokens(2, 40)
    with torch.no_grad():
        logits = loaded(tokens).logits  # unpacks at the first forward pass
        assert torch.equal(logits, leangrid.load(mixed("_SYM"))[0](tokens).logits)
    for name in finished.layers:
        assert torch.equal(loaded.get_submodule(name).weight, finished.weight_in_model_dtype(name)), name


def test_transformers_refuses_asymmetric_mixtures_aloud(mixed: Made) -> None:
    """It cannot load packed zero points but by unpacking, and it unpacks all layers by one group: no key of ours may
    lead it there."""
    assert not json.loads((mixed("") / "config.json").read_text())["quantization_config"].get("dequantize")
    with pytest.raises(RuntimeError, match="mismatch"):
        hf.AutoModelForCausalLM.from_pretrained(mixed(""))


def test_transformers_and_the_library_read_what_a_budget_chose(tiny: Callable[..., Path], tmp_path: Path) -> None:
    recipe, out = Recipe(scheme="W4A16_G32_SYM", bits=4.6, steps=64), tmp_path / "out"
    result = leangrid.quantize(tiny("llama2", torch.bfloat16), out, recipe, windows=tiny_models.tokens(2, 16))
    loaded, finished, tokens = (
        hf.AutoModelForCausalLM.from_pretrained(out),
        ResultReader.verified(out),
        tiny_models.tokens(2, 40),
    )
    groups = json.loads((out / "config.json").read_text())["quantization_config"]["config_groups"]
    assert len(groups) == len(result.budget["widths"]) > 1
    with torch.no_grad():
        logits = loaded(tokens).logits  # unpacks at the first forward pass
        assert torch.equal(logits, leangrid.load(out)[0](tokens).logits)
    for name in finished.layers:
        assert torch.equal(loaded.get_submodule(name).weight, finished.weight_in_model_dtype(name)), name


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"layers": {"mlp.down_proj": "NU4"}}, "one kind only"),
        ({"layers": {"mlp.down_proj": "GPTQ8"}}, "one kind only"),
        ({"scheme": "NU4", "layers": {"mlp.down_proj": "W8A16"}}, "one kind only"),
        ({"layers": {"mlp.donw_proj": "W8A16"}}, r"'mlp\.donw_proj' names no layer"),
        ({"layers": {"down_pro": "W8A16"}}, "names no layer"),
        ({"layers": {"re:(": "W8A16"}}, "no pattern"),
        ({"layers": {"mlp.down_proj": "W7A16"}}, "7 bits"),
        ({"layers": {"q_proj": "W8A16"}}, r"q_proj, k_proj, v_proj share an input.*Name all"),
        ({"layers": {"up_proj": "W8A16"}}, "gate_proj, up_proj share"),
    ],
)
def test_what_a_mixture_may_not_be(tiny: Callable[..., Path], fields: dict, words: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=words):
        leangrid.quantize(
            tiny("llama2"),
            tmp_path / "out",
            Recipe(**{"scheme": "W4A16_G32", **fields}),
            windows=tiny_models.tokens(2, 16),
        )
    assert not list(tmp_path.iterdir())


def test_containers_with_one_scheme_refuse(mixed: Made, tiny: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"gptq holds one scheme.*compressed-tensors"):
        export(mixed(""), tmp_path / "out", to="gptq")
    recipe = Recipe(scheme="W4A16_G32", layers={"mlp.down_proj": "W8A16_G32"}, format="gptq")
    with pytest.raises(FormatError, match="gptq holds one scheme"):
        leangrid.quantize(tiny("llama2"), tmp_path / "out", recipe, windows=tiny_models.tokens(2, 16))
    assert not list(tmp_path.iterdir())


def test_a_recipe_file_says_it_as_a_table(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text('scheme = "W4A16_G64"\n[layers]\n"mlp.down_proj" = "w8a16_g64"\n"re:.*gate_proj" = "W3A16"\n')
    recipe = Recipe.from_file(file)
    assert recipe.for_layer("model.layers.3.mlp.down_proj").scheme == "W8A16_G64"
    assert recipe.for_layer("model.layers.3.mlp.up_proj").scheme == "W4A16_G64"
    assert recipe.fingerprint() != Recipe(scheme="W4A16_G64").fingerprint()

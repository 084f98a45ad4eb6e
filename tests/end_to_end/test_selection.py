"""A run with --ignore or --only: what stays is the source's, the rest is quantized, and every reader opens it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers as hf
from safetensors.torch import load_file

import leangrid
from leangrid.exporters.export import export
from leangrid.patterns import Pattern
from leangrid.progress import Event
from leangrid.recipe import Recipe
from leangrid.run.quantize import quantize
from leangrid.run.result import QuantizeResult

Tiny = Callable[..., Path]
WINDOWS = tiny_models.tokens(4, 32)
MERGED = ("experts.gate_up_proj", "experts.down_proj")
RUNS_OF_ONE_BLOCK = "a block's experts stay"
RUNS = {
    "compressed-tensors": ("llama3", torch.float32, {"scheme": "W4A16_G32", "ignore": ["*.down_proj"]}),
    "lut": ("llama3", torch.float32, {"scheme": "NU4", "ignore": ["model.layers.0.*"]}),
    "lut, conv1d": ("gpt2", torch.float32, {"scheme": "NU4", "only": ["c_attn", "mlp.c_proj"]}),
    "gptq": ("llama3_tied", torch.float16, {"scheme": "W4A16_G32", "format": "gptq", "only": ["*.mlp.*"]}),
    "awq": ("llama3_tied", torch.float16, {"scheme": "W4A16_G32", "format": "awq", "ignore": ["self_attn.*"]}),
    "mlx": ("llama3", torch.bfloat16, {"scheme": "W4A16_G32", "format": "mlx", "ignore": ["re:.*down_proj"]}),
    "gguf": ("llama3", torch.bfloat16, {"scheme": "Q4_K", "format": "gguf", "ignore": ["*.down_proj"]}),
    "experts stay": ("qwen3_moe", torch.float32, {"scheme": "W4A16_G32", "ignore": ["*.experts.*"]}),
    "experts stay, lut": ("qwen3_moe", torch.float32, {"scheme": "NU4", "ignore": ["*.experts.*"]}),
    "a block's experts stay": ("mixtral", torch.float32, {"scheme": "W8A16_SYM", "ignore": ["*.layers.0.*.experts.*"]}),
    "fused experts stay": ("gpt_oss", torch.float32, {"scheme": "W8A16_SYM", "only": ["*.self_attn.*"]}),
    "a block's fused experts stay": ("gpt_oss", torch.float32, {"scheme": "NU4", "ignore": ["*.layers.1.*.experts.*"]}),
    "experts alone": ("qwen3_moe", torch.float32, {"scheme": "NU4", "only": ["*.experts.*"]}),
    "encoder": ("bert", torch.float32, {"scheme": "NU4", "ignore": ["re:.*output.dense"]}),
}


def _tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in directory.glob("*.safetensors") for name, t in load_file(file).items()}


def _merged(tensors: dict[str, torch.Tensor]) -> dict[tuple[int, ...], list[torch.Tensor]]:
    """The single matrices of each shape in tensors of all experts, gate and up one after the other."""
    found: dict[tuple[int, ...], list[torch.Tensor]] = {}
    for name, tensor in tensors.items():
        for whole in tensor if tensor.ndim == 3 else ():
            for part in whole.chunk(2) if "gate_up" in name else (whole,):
                found.setdefault(tuple(part.shape), []).append(part)
    return found


def _run(tiny: Tiny, run: str, out: Path) -> tuple[Path, QuantizeResult]:
    name, dtype, fields = RUNS[run]
    source = tiny(name, dtype=dtype)
    return source, quantize(source, out, Recipe(samples=4, length=32, **fields), windows=WINDOWS)


@pytest.mark.parametrize("run", RUNS)
def test_what_stays_is_the_sources_and_readers_open_it(run: str, tiny: Tiny, tmp_path: Path) -> None:
    source, done = _run(tiny, run, tmp_path / "out")
    assert done.exit_code == 0 and "error" not in done.quality, done.quality
    assert done.quality["original"] == "transformers"
    ours, theirs = _tensors(tmp_path / "out"), _tensors(source)

    recipe = Recipe(**RUNS[run][2])
    for name, tensor in theirs.items():
        linear = name.removesuffix(".weight")
        stays = any(Pattern(text).matches(linear) for text in recipe.ignore)
        stays |= bool(recipe.only) and not any(Pattern(text).matches(linear) for text in recipe.only)
        if stays and name in ours:
            assert torch.equal(ours[name], tensor) and ours[name].dtype == tensor.dtype, name
        elif stays:  # an expert's, in the tensor of all experts
            assert any(torch.equal(tensor, part) for part in _merged(ours)[tuple(tensor.shape)]), name
    model, _ = leangrid.load(tmp_path / "out")
    export(tmp_path / "out", tmp_path / "dense", to="dense")
    dense, _ = leangrid.load(tmp_path / "dense")
    with torch.no_grad():
        packed, plain = model(input_ids=WINDOWS[:1])[0], dense(input_ids=WINDOWS[:1])[0]
    near = {"atol": 2e-3, "rtol": 1e-2} if packed.dtype == torch.float16 else {}  # products rounded in another order
    torch.testing.assert_close(packed, plain, **near)


def test_ignore_of_config_json_names_what_stays_and_plain_transformers_opens_it(tiny: Tiny, tmp_path: Path) -> None:
    _run(tiny, "compressed-tensors", tmp_path / "out")
    entry = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert set(entry["ignore"]) == {"lm_head", *(f"model.layers.{i}.mlp.down_proj" for i in range(2))}
    model: Any = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ours, _ = leangrid.load(tmp_path / "out")
    with torch.no_grad():
        found, expected = (one(input_ids=WINDOWS[:1]).logits for one in (model, ours))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("run", ["experts stay", "a block's experts stay", "fused experts stay"])
def test_experts_that_stay_open_in_plain_transformers(run: str, tiny: Tiny, tmp_path: Path) -> None:
    source, _ = _run(tiny, run, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["opened_in"] == {"leangrid.load": "yes", "transformers": "yes"}
    opened: Any = hf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    model, info = opened
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ours, _ = leangrid.load(tmp_path / "out")
    with torch.no_grad():
        found, expected = (one(input_ids=WINDOWS[:1]).logits for one in (model, ours))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    original: Any = hf.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for name, parameter in original.named_parameters():
        if name.endswith(MERGED) and (run != RUNS_OF_ONE_BLOCK or ".layers.0." in name):
            assert torch.equal(model.get_parameter(name), parameter), name


@pytest.mark.parametrize(
    ("run", "of"),
    [
        ("experts stay", None),
        ("fused experts stay", None),
        ("a block's fused experts stay", "those of 1 of 2 mixtures"),
    ],
)
def test_a_notice_says_in_which_form_experts_are_written(run: str, of: str | None, tiny: Tiny, tmp_path: Path) -> None:
    name, dtype, fields = RUNS[run]
    said: list[str] = []
    recipe = Recipe(samples=4, length=32, **fields)
    quantize(
        tiny(name, dtype=dtype), tmp_path / "out", recipe, windows=WINDOWS, progress=lambda e: said.append(e.message)
    )
    about = [sentence for sentence in said if "one by one" in sentence]
    assert len(about) == (of is not None) and all(f": {of} are read one by one, and written so" in s for s in about)
    written = {".".join(n.split(".")[:3]) for n in _tensors(tmp_path / "out") if ".experts.0." in n}
    assert written == ({"model.layers.0"} if of else set())


@pytest.mark.parametrize(("run", "merged"), [("experts stay", True), ("experts stay, lut", False)])
def test_experts_are_merged_only_where_plain_transformers_reads_the_container(
    run: str, merged: bool, tiny: Tiny, tmp_path: Path
) -> None:
    """Other readers of it expect the names of the source."""
    source, _ = _run(tiny, run, tmp_path / "out")
    ours = {name for name in _tensors(tmp_path / "out") if ".experts." in name}
    whole = {f"model.layers.{i}.mlp.experts.{leaf}" for i in range(2) for leaf in ("gate_up_proj", "down_proj")}
    assert ours == (whole if merged else {name for name in _tensors(source) if ".experts." in name})


def test_manifest_card_and_page_say_what_stays_and_why(tiny: Tiny, tmp_path: Path) -> None:
    _run(tiny, "experts stay", tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["recipe"]["ignore"] == ["*.experts.*"]
    kept = {(entry["name"], entry["why"]): entry["count"] for entry in manifest["kept"]}
    assert kept["*.experts.*", "--ignore"] == 2 * 4 * 3
    assert kept["model.layers.*.mlp.gate", "routes tokens to experts"] == 2
    assert manifest["structure"]["lists"] == ["model.layers"] and manifest["structure"]["blocks"] == 2
    for page in ("README.md", "report.html"):
        text = (tmp_path / "out" / page).read_text()
        assert "What was quantized, and what was not" in text and "*.experts.* (24): --ignore" in text, page


@pytest.mark.parametrize("run", ["lut", "experts stay", "a block's fused experts stay"])
def test_a_stopped_run_goes_on_to_the_same_bytes(run: str, tiny: Tiny, tmp_path: Path) -> None:
    source, _ = _run(tiny, run, tmp_path / "whole")

    def stop(event: Event) -> None:
        if event.stage == "block" and event.block == 0:
            raise KeyboardInterrupt

    recipe = Recipe(samples=4, length=32, **RUNS[run][2])
    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "out", recipe, windows=WINDOWS, progress=stop)
    quantize(source, tmp_path / "out", recipe, windows=WINDOWS)
    ours, theirs = _tensors(tmp_path / "out"), _tensors(tmp_path / "whole")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)

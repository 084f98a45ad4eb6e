"""The main job on tiny models of every architecture: a checkpoint in, a finished directory out, opened by
transformers."""

import json
from pathlib import Path

import pytest
import tiny_models
import torch
import transformers

import leangrid
from leangrid.errors import FormatError, OutputError, ResumeError, ShapeError
from leangrid.models.skeleton import Skeleton
from leangrid.progress import Event
from leangrid.recipe import Recipe
from leangrid.run.quantize import quantize
from leangrid.storage.manifest import list_differences
from leangrid.storage.source import open_source

WINDOWS = tiny_models.tokens(6, 48)


def _open(directory: Path, name: str) -> torch.nn.Module:
    kind = transformers.AutoModel if name in tiny_models.ENCODERS else transformers.AutoModelForCausalLM
    return kind.from_pretrained(directory)


def _output(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        result = model(ids)
    return result.logits if hasattr(result, "logits") else result.last_hidden_state


@pytest.mark.parametrize("name", tiny_models.NAMES)
def test_nonuniform_result_of_every_architecture(name: str, tmp_path: Path) -> None:
    source = tiny_models.save(name, tmp_path / "source")
    result = quantize(source, tmp_path / "out", Recipe(scheme="NU4"), windows=WINDOWS)
    skeleton = Skeleton(open_source(source))
    assert result.layers == len(skeleton.all_linear_names())
    assert result.exit_code == 0 and 0 < result.loss < result.loss_rounding
    assert list_differences(tmp_path / "out") == []
    assert not (tmp_path / "out.partial").exists()
    model, _ = leangrid.load(tmp_path / "out")
    dense = tiny_models.build(name)
    for linear in skeleton.all_linear_names():
        weight = model.get_submodule(linear).weight_hat
        stored = weight.t() if skeleton.layer_kind(linear) == "conv1d" else weight
        dense.get_parameter(f"{linear}.weight").data.copy_(stored)
    ids = WINDOWS[:2]
    torch.testing.assert_close(_output(model, ids), _output(dense, ids), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(_output(_open(tmp_path / "out", name), ids), _output(dense, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [n for n in tiny_models.NAMES if n != "gpt2"])
def test_affine_result_of_every_architecture_opens_in_transformers(name: str, tmp_path: Path) -> None:
    source = tiny_models.save(name, tmp_path / "source", dtype=torch.bfloat16)
    result = quantize(source, tmp_path / "out", Recipe(scheme="W4A16_G32"), windows=WINDOWS)
    assert result.format == "compressed-tensors" and result.loss < result.loss_rounding
    theirs = _open(tmp_path / "out", name)
    ours, _ = leangrid.load(tmp_path / "out")
    ids = WINDOWS[:2]
    torch.testing.assert_close(_output(theirs, ids), _output(ours, ids), rtol=0, atol=0.05)


def test_the_learned_result_is_closer_than_gptq_and_rounding(tmp_path: Path) -> None:
    source = tiny_models.save("llama3_tied", tmp_path / "source")
    original, held_out = tiny_models.build("llama3_tied"), tiny_models.tokens(4, 48, seed=7)
    distance = {}
    for scheme in ("NU3", "GPTQ3", "RTN3"):
        quantize(source, tmp_path / scheme, Recipe(scheme=scheme), windows=tiny_models.tokens(64, 48))
        model, _ = leangrid.load(tmp_path / scheme)
        distance[scheme] = float((_output(model, held_out) - _output(original, held_out)).pow(2).mean())
    assert distance["NU3"] < distance["GPTQ3"] < distance["RTN3"]


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    quantize(
        tiny_models.save("llama3_tied", tmp_path / "source"), tmp_path / "out", Recipe(scheme="NU4"), windows=WINDOWS
    )
    model, _ = leangrid.load(tmp_path / "out")
    assert model.get_output_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()  # pyright: ignore
    assert "lm_head.weight" not in open_source(tmp_path / "out", allow_quantized=True).tensors


def _stop_after(block: int) -> object:
    def progress(event: Event) -> None:
        if event.stage == "block" and event.block == block:
            raise KeyboardInterrupt

    return progress


@pytest.mark.fault("C4")
@pytest.mark.parametrize("scheme", ["NU3", "W4A16_G32"])
def test_a_stopped_run_resumes_to_the_same_bytes(scheme: str, tmp_path: Path) -> None:
    source, recipe = tiny_models.save("qwen3", tmp_path / "source"), Recipe(scheme=scheme)
    quantize(source, tmp_path / "whole", recipe, windows=WINDOWS)
    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "out", recipe, windows=WINDOWS, progress=_stop_after(0))  # pyright: ignore[reportArgumentType]
    assert (tmp_path / "out.partial").is_dir() and not (tmp_path / "out").exists()
    events: list[Event] = []
    quantize(source, tmp_path / "out", recipe, windows=WINDOWS, progress=events.append)
    assert [e.block for e in events if e.stage == "block"] == [1], "block 0 was done again"
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.fault("C12")
def test_an_unfinished_run_of_another_recipe_is_refused_until_restart(tmp_path: Path) -> None:
    source = tiny_models.save("llama2", tmp_path / "source")
    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "out", Recipe(scheme="NU4"), windows=WINDOWS, progress=_stop_after(0))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ResumeError, match="damping"):
        quantize(source, tmp_path / "out", Recipe(scheme="NU4", damping=0.02), windows=WINDOWS)
    quantize(source, tmp_path / "out", Recipe(scheme="NU4", damping=0.02), windows=WINDOWS, restart=True)
    assert list_differences(tmp_path / "out") == []


@pytest.mark.fault("C7")
def test_an_output_that_exists_is_refused_and_overwrite_replaces_only_ours(tmp_path: Path) -> None:
    source = tiny_models.save("llama2", tmp_path / "source")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(OutputError):
            quantize(source, tmp_path / "out", Recipe(scheme="NU4"), windows=WINDOWS, overwrite=overwrite)
    assert (tmp_path / "out" / "precious").read_text() == "x" and not (tmp_path / "out.partial").exists()
    quantize(source, tmp_path / "ours", Recipe(scheme="NU4"), windows=WINDOWS)
    quantize(source, tmp_path / "ours", Recipe(scheme="NU3"), windows=WINDOWS, overwrite=True)
    assert json.loads((tmp_path / "ours" / "manifest.json").read_text())["recipe"]["scheme"] == "NU3"


@pytest.mark.fault("S14")
def test_what_cannot_be_done_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    source = tiny_models.save("llama2", tmp_path / "source")
    with pytest.raises(
        ShapeError, match=r"groups of 48 do not divide 64 columns \(model\.layers\.0\.self_attn\.q_proj\).*W4A16_G64"
    ):
        quantize(source, tmp_path / "out", Recipe(scheme="W4A16_G48"), windows=WINDOWS)
    with pytest.raises(FormatError, match="affine grids only"):
        quantize(source, tmp_path / "out", Recipe(scheme="NU4", format="compressed-tensors"), windows=WINDOWS)
    with pytest.raises(FormatError, match="no format"):
        quantize(source, tmp_path / "out", Recipe(scheme="NU4", format="zip"), windows=WINDOWS)
    gpt2 = tiny_models.save("gpt2", tmp_path / "gpt2")
    with pytest.raises(FormatError, match="NU4"):
        quantize(gpt2, tmp_path / "out", Recipe(scheme="W4A16_G32"), windows=WINDOWS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gpt2", "source"]


def test_the_default_scheme_takes_groups_where_they_fit(tmp_path: Path) -> None:
    source = tiny_models.save("llama2", tmp_path / "source")  # 64 columns: no group of 128
    notices: list[str] = []
    result = quantize(source, tmp_path / "out", Recipe(), windows=WINDOWS, progress=lambda e: notices.append(e.message))
    assert result.scheme == "W4A16" and any("W4A16" in n for n in notices)


def test_records_hold_every_layer_and_its_three_losses(tmp_path: Path) -> None:
    result = quantize(
        tiny_models.save("phi3", tmp_path / "source"), tmp_path / "out", Recipe(scheme="W3A16_G32"), windows=WINDOWS
    )
    lines = [json.loads(line) for line in (tmp_path / "out" / "records.jsonl").read_text().splitlines()]
    assert [line["name"].rpartition("layers.")[2] for line in lines][:2] == [
        "0.self_attn.qkv_proj",
        "0.self_attn.o_proj",
    ]
    assert len(lines) == result.layers == 8
    for line in lines:
        assert 0 < line["loss"] < line["loss_rounding"] and line["tokens"] == WINDOWS.numel()
    assert sum(line["loss"] for line in lines) == pytest.approx(result.loss)
    assert set(result.seconds) >= {"total", "load", "calibrate", "hessian", "factor", "grid", "solve", "pack", "save"}

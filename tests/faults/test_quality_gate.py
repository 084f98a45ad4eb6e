"""Row O8 of the fault table: a result that was written, and is wrong, never ends with exit code 0 (gate/judge.py)."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from typer.testing import CliRunner

import leangrid
from leangrid import formats
from leangrid.cli.app import app
from leangrid.gate.quality import KL_LIMITS, Quality
from leangrid.metrics.divergence import divergence
from leangrid.recipe import Recipe
from leangrid.run.quantize import quantize
from leangrid.storage import failpoints, writer
from leangrid.storage.manifest import list_differences

Tiny = Callable[..., Path]
WINDOWS = tiny_models.tokens(4, 48)
pytestmark = [pytest.mark.fault("O8"), pytest.mark.filterwarnings("ignore:leangrid runs without its C")]


def shifted(monkeypatch: pytest.MonkeyPatch, victim: int) -> None:
    """The zero points of the ``victim``-th layer are written one too high, as a reader of another convention would take
    them."""
    container = formats.FORMATS["compressed-tensors"]
    real, calls = container.pack, iter(range(10_000))

    def pack(codes: Any, grid: Any, *rest: Any) -> Any:
        if next(calls) == victim:
            grid = replace(
                grid, zero_point=(grid.zero_point + 1).clamp(max=grid.levels.shape[-1] - 1).to(grid.zero_point.dtype)
            )
        return real(codes, grid, *rest)

    monkeypatch.setattr(container, "pack", pack)


@pytest.mark.parametrize("name", ["llama3_tied", "gpt2", "opt"])
def test_the_gate_measures_what_transformers_would(name: str, tiny: Tiny, tmp_path: Path) -> None:
    result = quantize(tiny(name), tmp_path / "out", Recipe(scheme="NU3"), windows=WINDOWS)
    model, _ = leangrid.load(tmp_path / "out")
    original = tiny_models.build(name)
    with torch.no_grad():
        compared = [
            divergence(torch.log_softmax(original(ids[None]).logits[0, :-1], -1), model(ids[None]).logits[0])
            for ids in WINDOWS[:2]
        ]
    assert result.quality["value"] == pytest.approx(float(torch.cat([c.kl for c in compared]).mean()), rel=1e-3)
    assert result.quality["top1_agreement"] == pytest.approx(
        float(torch.cat([c.agrees for c in compared]).double().mean()), abs=1e-3
    )
    assert result.quality["passed"] and result.exit_code == 0 and result.seconds["check"] > 0
    kept = json.loads((tmp_path / "out" / "manifest.json").read_text())["quality"]
    assert (
        kept == {key: value for key, value in result.quality.items() if key != "passed"}
        and kept["limit"] == KL_LIMITS[3]
    )


def test_an_encoder_is_measured_by_its_states(tiny: Tiny, tmp_path: Path) -> None:
    result = quantize(tiny("bert"), tmp_path / "out", Recipe(scheme="NU3"), windows=WINDOWS)
    model, _ = leangrid.load(tmp_path / "out")
    with torch.no_grad():
        ours, theirs = (m(WINDOWS[:2]).last_hidden_state.double().mean(1) for m in (model, tiny_models.build("bert")))
    assert result.quality["value"] == pytest.approx(float((1 - torch.cosine_similarity(ours, theirs)).mean()), rel=1e-2)
    assert result.quality["measure"] == "cosine" and result.exit_code == 0
    assert quantize(tiny("bert"), tmp_path / "strict", Recipe(scheme="NU3"), windows=WINDOWS, max_kl=0.0).exit_code == 4


@pytest.mark.parametrize(("victim", "layer"), [(2, "layers.0.self_attn.v_proj"), (13, "layers.1.mlp.down_proj")])
def test_one_layer_with_shifted_zero_points_is_found_and_named(
    victim: int, layer: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe(scheme="W4A16_G32")
    sound = quantize(tiny("llama2"), tmp_path / "sound", recipe, windows=WINDOWS).quality
    limit = 1.5 * sound["value"]
    shifted(monkeypatch, victim)
    result = quantize(tiny("llama2"), tmp_path / "out", recipe, windows=WINDOWS, max_kl=limit)
    assert result.exit_code == 4 and not result.too_many_rescues
    assert result.quality["worst_layers"][0]["name"].endswith(layer)
    assert layer in Quality.from_dict(result.quality).verdict
    assert list_differences(tmp_path / "out") == []


def test_the_command_says_why_it_ends_with_4(tiny: Tiny, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A sentence of a text that is long enough. " * 100)
    arguments = [
        "quantize",
        str(tiny("llama3")),
        str(tmp_path / "out"),
        "--scheme",
        "NU2",
        "--calibration",
        str(text),
        "--samples",
        "4",
        "--length",
        "32",
        "--quiet",
        "--max-kl",
        "1e-9",
        "--json",
    ]
    done = CliRunner().invoke(app, arguments, prog_name="leangrid")
    assert done.exit_code == 4, done.output
    assert (
        "the mean KL from the original is" in done.stderr and "worst layers" in done.stderr and "_proj (" in done.stderr
    )
    said = json.loads(done.stdout)["quality"]
    assert said["limit"] == 1e-9 and not said["passed"]


@pytest.mark.parametrize("damage", ["cut", "nan", "config"])
def test_what_cannot_be_opened_again_is_said(
    damage: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = writer._add

    def add(staged: Path, listed: Any, name: str, chunks: Any) -> None:
        if name == "config.json" and damage == "config":
            chunks = chunks.replace(b'"quant_method": "leangrid"', b'"quant_method": "unheard"')
        real(staged, listed, name, chunks)
        shard = staged / "model.safetensors"
        if name == "config.json" and damage == "cut":
            shard.write_bytes(shard.read_bytes()[:-8])
        elif name == "config.json" and damage == "nan":
            data = shard.read_bytes()
            shard.write_bytes(data[:-4] + b"\xff\xff\xff\xff")  # the last float32 of a level or a norm

    monkeypatch.setattr(writer, "_add", add)
    result = quantize(tiny("llama2"), tmp_path / "out", Recipe(scheme="NU4"), windows=WINDOWS)
    assert result.exit_code == 4 and "cannot be opened again" in result.quality["error"]
    assert "cannot be opened again" in Quality.from_dict(result.quality).verdict
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["quality"] == {"error": result.quality["error"]}


def test_a_run_killed_after_its_end_keeps_the_verdict(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        failpoints.reset()
        patch.setenv("LEANGRID_FAILPOINT", "publish.after_sync:1:raise:SIGINT")
        with pytest.raises(KeyboardInterrupt):
            quantize(tiny("llama2"), tmp_path / "out", Recipe(scheme="NU2"), windows=WINDOWS, max_kl=1e-9)
    assert (tmp_path / "out").is_dir()
    result = quantize(tiny("llama2"), tmp_path / "out", Recipe(scheme="NU2"), windows=WINDOWS, max_kl=1e-9)
    assert result.exit_code == 4 and result.quality["limit"] == 1e-9

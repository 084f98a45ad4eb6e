"""The plan: sizes exact, the rest an estimate, what cannot fit refused."""

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import tiny_models
import torch

from leangrid.errors import OutputError, ShapeError
from leangrid.planning.cost import Rates, estimate_seconds
from leangrid.planning.placement import Placement
from leangrid.planning.plan import plan
from leangrid.planning.resolve import open_checkpoint
from leangrid.planning.sizes import compute_sizes
from leangrid.recipe import Recipe
from leangrid.run.quantize import quantize


@pytest.mark.parametrize("scheme", ["NU3", "W4A16_G32", "W2A16", "RTN8_G64_SYM"])
def test_bits_and_layers_are_what_the_run_gives(scheme: str, tmp_path: Path) -> None:
    source = tiny_models.save("llama2", tmp_path / "source", dtype=torch.bfloat16)
    recipe = Recipe(scheme=scheme, samples=4, length=32)
    planned = plan(source, recipe)
    done = quantize(source, tmp_path / "out", recipe, windows=tiny_models.tokens(4, 32))
    assert planned.layers == done.layers and planned.bits_per_weight == pytest.approx(done.bits_per_weight, abs=1e-3)
    tensors = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert planned.bytes == pytest.approx(
        tensors, rel=0.15
    )  # the rest is the file's header: large only for a tiny model
    assert set(planned.to_dict()) >= {
        "scheme",
        "layers",
        "bits_per_weight",
        "bytes",
        "seconds",
        "peak_ram_bytes",
        "peak_gpu_bytes",
        "bound",
    }


def test_nothing_is_written_and_nothing_impossible_is_planned(tmp_path: Path) -> None:
    source = tiny_models.save("llama2", tmp_path / "source")
    with pytest.raises(ShapeError, match="do not divide"):
        plan(source, Recipe(scheme="W4A16_G48"))
    plan(source, Recipe(scheme="NU4", samples=1, length=32))
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


@pytest.mark.fault("R3")
def test_too_little_memory_is_refused_with_what_would_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_models.save("llama2", tmp_path / "source")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**20))
    with pytest.raises(OutputError, match=r"GiB can be had.*--samples"):
        plan(source, Recipe(scheme="NU4"))


def test_more_windows_need_more_memory_and_time(tmp_path: Path) -> None:
    source = tiny_models.save("llama2", tmp_path / "source")
    small, large = (plan(source, Recipe(scheme="NU4", samples=n, length=256)) for n in (16, 1024))
    assert large.peak_ram_bytes > small.peak_ram_bytes and large.seconds["calibrate"] > 10 * small.seconds["calibrate"]


def test_text_that_the_model_writes_takes_its_time(tmp_path: Path) -> None:
    """In a mixture that of its windows alone."""
    source = tiny_models.synthetic(tmp_path / "source", blocks=2, hidden=128)
    seconds = {}
    for calibration in ("embedded", "embedded:48,self:16", "embedded:32,self:32", "self"):
        recipe = Recipe(calibration=calibration, samples=64, length=64)
        _, skeleton, resolved = open_checkpoint(source, recipe)
        layers = compute_sizes(skeleton, resolved).layers
        rates = Rates(1e9, 1e9, 1e9, 1.0)
        seconds[calibration] = estimate_seconds(skeleton, resolved, layers, Placement(1), rates)["calibrate"]
    read, quarter, half, whole = seconds.values()
    assert read < quarter and half - read == pytest.approx(2 * (quarter - read), abs=0.03)
    assert whole - read == pytest.approx(4 * (quarter - read), abs=0.03)

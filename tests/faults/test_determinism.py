"""The same recipe gives the same bytes, with any number of threads, and the manifest says what has to be the same for
that."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny_models
import torch
from tiny_run import digest

from leangrid.progress import Event
from leangrid.recipe import Recipe
from leangrid.report.views import TIMED
from leangrid.run.publish import describe_determinism
from leangrid.run.quantize import quantize

Tiny = Callable[..., Path]
WINDOWS = tiny_models.tokens(4, 64)
pytestmark = pytest.mark.filterwarnings("ignore:leangrid runs without its C")


def lasting(out: Path) -> dict[str, str]:
    """Every file whose bytes are promised."""
    return {name: sha256 for name, sha256 in digest(out).items() if name not in TIMED}


def claim(out: Path) -> dict:
    return json.loads((out / "manifest.json").read_text())["determinism"]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Uninitialised memory is NaN instead of what was there."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.fault("N14")
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(
    ("scheme", "dtype"), [pytest.param("NU3", torch.float32, marks=pytest.mark.slow), ("W4A16_G64", torch.bfloat16)]
)
def test_twice_with_one_thread_and_with_two(scheme: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = tiny_models.synthetic(tmp_path / "source", blocks=1, hidden=192, dtype=dtype)
    found = []
    for number, count in enumerate((1, 1, 2)):
        out = tmp_path / f"out{number}"
        quantize(source, out, Recipe(scheme=scheme), windows=WINDOWS, threads=count)
        found.append(lasting(out))
        assert claim(out)["claim"] == "same bytes" and claim(out)["scope"]["threads"] == [str(count)]
        assert set(claim(out)["except"]) == TIMED
    assert found[0] == found[1], "the same machine, the same recipe"
    assert found[0] == found[2], "rows are independent"


@pytest.mark.fault("N14")
@pytest.mark.usefixtures("poisoned")
def test_nothing_is_read_before_it_is_written(tiny: Tiny, tmp_path: Path) -> None:
    torch.use_deterministic_algorithms(False)
    quantize(tiny("llama2"), tmp_path / "plain", Recipe(scheme="NU4"), windows=WINDOWS)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert bool(torch.empty(1000).isnan().all())
    quantize(tiny("llama2"), tmp_path / "poisoned", Recipe(scheme="NU4"), windows=WINDOWS)
    assert lasting(tmp_path / "plain") == lasting(tmp_path / "poisoned")


@pytest.mark.slow
@pytest.mark.fault("N14")
@pytest.mark.usefixtures("threads")
def test_a_real_model_with_one_thread_and_with_two(smollm2_gguf: Path, tmp_path: Path) -> None:
    recipe = Recipe(scheme="W4A16_G64", calibration="embedded", samples=2, length=256)
    for count in (1, 2):
        quantize(smollm2_gguf, tmp_path / str(count), recipe, threads=count)
    assert lasting(tmp_path / "1") == lasting(tmp_path / "2")


@pytest.mark.fault("C13")
@pytest.mark.usefixtures("threads")
def test_a_run_half_with_one_thread_and_half_with_two_is_recorded(tiny: Tiny, tmp_path: Path) -> None:
    def stop(event: Event) -> None:
        if event.stage == "block":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(tiny("llama2"), tmp_path / "out", Recipe(scheme="NU4"), windows=WINDOWS, threads=1, progress=stop)
    quantize(tiny("llama2"), tmp_path / "out", Recipe(scheme="NU4"), windows=WINDOWS, threads=2)
    assert claim(tmp_path / "out")["claim"] == "tolerance"
    assert claim(tmp_path / "out")["scope"]["threads"] == ["1", "2"]
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["threads"] == [1, 2]
    quantize(tiny("llama2"), tmp_path / "whole", Recipe(scheme="NU4"), windows=WINDOWS, threads=1)
    assert lasting(tmp_path / "out").keys() == lasting(tmp_path / "whole").keys()


def test_gpus_are_in_the_scope_and_two_models_of_them_promise_no_bytes() -> None:
    info = {"device": "cuda", "threads": 2, "ranks": 1, "kernels": "triton", "products": "bfloat16", "placement": {}}
    one, other = ({**info, "gpu": f"NVIDIA {name}, capability 9.0, CUDA 13.0"} for name in ("H100", "H200"))
    assert describe_determinism([one, one])["scope"]["gpu"] == [one["gpu"]]
    assert describe_determinism([one, one])["claim"] == "same bytes"
    assert describe_determinism([one, other])["claim"] == "tolerance"
    assert "gpu" not in describe_determinism([{**info, "gpu": None}])["scope"]

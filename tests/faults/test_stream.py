"""A model streamed from a hub on this machine gives the bytes of the downloaded one, also over broken connections."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_models
from hub_server import COMMIT, Hub
from tiny_run import digest

from leangrid.errors import CalibrationError, CheckpointError
from leangrid.recipe import Recipe
from leangrid.report.views import TIMED
from leangrid.run.quantize import quantize
from leangrid.storage.hub import locate_source, locate_stream

ROOT = Path(__file__).resolve().parents[2]
WINDOWS = tiny_models.tokens(2, 16)
# In a process of its own: the hub's client reads its settings when it is imported.
_RUN = """
import json, sys, torch
from leangrid import plan
from leangrid.errors import LeangridError
from leangrid.run.quantize import quantize
from leangrid.recipe import Recipe
from leangrid.storage import remote
remote._PAUSE = 0.01
torch.set_num_threads(1)
windows = torch.randint(4, 512, (2, 16), generator=torch.Generator().manual_seed(0))
try:
    planned = plan("stream:org/tiny", Recipe(scheme="NU4", samples=2, length=16))
    result = quantize("stream:org/tiny@main", sys.argv[1], Recipe(scheme="NU4"), windows=windows)
    print(json.dumps({"layers": result.layers, "planned": planned.bytes_before}))
except LeangridError as error:
    print(json.dumps({"error": str(error), "exit_code": error.exit_code}))
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    folder = tiny_models.save("llama2", tmp_path / "served")
    (folder / "model.safetensors").unlink()
    tiny_models.build("llama2").save_pretrained(folder, max_shard_size=200 * 1024)
    with Hub(folder) as server:
        yield server


def _streamed(hub: Hub, tmp_path: Path) -> dict:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "src"),
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", _RUN, str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def _bytes(out: Path) -> dict[str, str]:
    return {
        name: sha256 for name, sha256 in digest(out).items() if name not in {*TIMED, "README.md"}
    }  # the card names the source


@pytest.mark.fault("S13")
def test_streamed_weights_give_the_bytes_of_downloaded_ones(hub: Hub, tmp_path: Path) -> None:
    quantize(hub.folder, tmp_path / "expected", Recipe(scheme="NU4"), windows=WINDOWS)
    hub.breaks = set(range(7, 200, 12))
    found = _streamed(hub, tmp_path)
    weights = {path.name for path in hub.files() if path.suffix == ".safetensors"}
    assert found == {"layers": 14, "planned": found["planned"]} and len(weights) >= 3
    assert _bytes(tmp_path / "out") == _bytes(tmp_path / "expected")
    kept = {path.name for path in (tmp_path / "home").rglob("*")}
    assert "config.json" in kept and not kept & weights and not weights & set(hub.whole), "no shard was downloaded"
    assert {name for name, _, _ in hub.parts} == weights
    largest = max(stop - start for _, start, stop in hub.parts)
    assert largest == 4 * tiny_models.VOCAB * tiny_models.HIDDEN, "one tensor at a time"


@pytest.mark.fault("C9")
@pytest.mark.slow
def test_a_hub_that_goes_away_stops_a_run_that_goes_on_later(hub: Hub, tmp_path: Path) -> None:
    quantize(hub.folder, tmp_path / "expected", Recipe(scheme="NU4"), windows=WINDOWS)
    shards = len([path for path in hub.files() if path.suffix == ".safetensors"])
    hub.breaks = set(range(2 * 18 * shards + 9, 100_000))  # after the headers and samples of plan and quantize
    stopped = _streamed(hub, tmp_path)
    assert (
        stopped["exit_code"] == 3
        and "cannot be read from the hub any more" in stopped["error"]
        and COMMIT in stopped["error"]
    )
    assert not (tmp_path / "out").exists()
    hub.breaks = set()
    assert _streamed(hub, tmp_path)["layers"] == 14
    assert _bytes(tmp_path / "out") == _bytes(tmp_path / "expected")
    hub.closed = True
    assert "hub cannot be reached" in _streamed(hub, tmp_path / "elsewhere")["error"]


def test_what_cannot_be_streamed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="only plan and quantize read a model as a stream"):
        locate_source("stream:org/tiny")
    for name in ("stream:", "stream:./model", "stream:model.gguf"):
        with pytest.raises(CheckpointError, match="what is streamed is a hub id"):
            locate_stream(name)
    with pytest.raises(CheckpointError, match="hub cannot be reached"):
        locate_stream("stream:org/absent")
    assert list(tmp_path.iterdir()) == []


def test_a_streamed_model_does_not_write_its_own_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from leangrid.storage.remote import Remote

    monkeypatch.setattr("leangrid.run.inputs.locate_stream", lambda _: (tmp_path, Remote("org/tiny", COMMIT, {})))
    with pytest.raises(CalibrationError, match="cannot write its own text"):
        quantize("stream:org/tiny", tmp_path / "out", Recipe(calibration="self"))

"""The GPU block benchmark runs whole where there is no GPU, and says so where it needs one."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture
def script(bench: Callable[[str], ModuleType]) -> ModuleType:
    return bench("gpu_block")


def _main(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks/gpu_block.py", *arguments])
    script.main()


def test_tiny_runs_anywhere(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "results.jsonl"
    _main(
        script,
        monkeypatch,
        "--model",
        "tiny",
        "--device",
        "cpu",
        "--scheme",
        "NU4",
        "--out",
        str(out),
        "--folder",
        str(tmp_path),
    )
    line = json.loads(capsys.readouterr().out)
    assert json.loads(out.read_text()) == line and [p.name for p in tmp_path.iterdir()] == ["results.jsonl"]
    assert (
        line["benchmark"] == "gpu_block" and line["model"] == "tiny" and line["layers"] == 4 and line["tokens"] == 512
    )
    assert len(line["block_seconds"]) == 2 and line["projected_hours"] >= 0 and line["planned_bytes"] > 0
    assert line["peak_gpu_bytes"] == 0 and line["planned_over_measured"] is None and 0 < line["loss_over_minmax"] < 1
    assert {"command", "versions", "machine", "date", "placement", "seconds", "planned_parts"} <= line.keys()


def test_a_405b_block_fits_a_card_of_48_gib_by_the_plan(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _main(script, monkeypatch, "--model", "llama-3.1-405b", "--planned", "2x48GB")
    line = json.loads(capsys.readouterr().out)
    assert line["planned_bytes"] == sum(line["planned_parts"].values()) < 48 * 2**30 and line["placement"]["in_place"]
    assert line["variant"] == "planned, 2x48GB" and line["devices"] == 2 and line["tokens"] == 128 * 2048


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what the test says is missing")
def test_a_missing_gpu_is_one_sentence(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="no CUDA device here"):
        _main(script, monkeypatch, "--model", "llama-3-8b")
    with pytest.raises(SystemExit, match="would take hours"):
        _main(script, monkeypatch, "--model", "llama-3.1-405b", "--device", "cpu")

"""Peak memory grows with the largest block, not with the model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models

from leangrid.models.gguf import dequantize

_RUN = """
import json, sys
from leangrid.run.quantize import quantize
from leangrid.recipe import Recipe
import torch
windows = torch.randint(4, 512, (4, 64), generator=torch.Generator().manual_seed(0))
seen = []
result = quantize(sys.argv[1], sys.argv[2], Recipe(scheme="GPTQ4"), windows=windows, threads=1,
                  progress=lambda e: seen.append(e.memory_bytes) if e.stage == "block" else None)
print(json.dumps({"peak": result.peak_ram_bytes, "after_block": seen}))
"""


def _run(directory: Path, blocks: int) -> dict:
    source = tiny_models.synthetic(directory / f"source{blocks}", blocks=blocks, hidden=384)
    command = [sys.executable, "-c", _RUN, str(source), str(directory / f"out{blocks}")]
    # glibc keeps holes between live allocations, a few blocks' worth that come and go from run to run. With every large
    # tensor mapped by itself, the figures are what the program holds.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.fault("R6")
def test_peak_is_flat_in_the_number_of_blocks(tmp_path: Path) -> None:
    few, many = _run(tmp_path, 4), _run(tmp_path, 10)
    block_bytes = 4 * (3 * 384 * 384 + 3 * 3 * 384 * 384)  # float32: 7 MB, so 6 more blocks hold 42 MB
    assert many["peak"] - few["peak"] < 2 * block_bytes
    assert many["after_block"][-1] - many["after_block"][2] < 2 * block_bytes


def _said(*arguments: object) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", "leangrid", *map(str, arguments), "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.fault("R3")
@pytest.mark.parametrize("scheme", ["W4A16_G64", "NU4", "GPTQ4"])
def test_the_plan_of_a_real_model_is_the_peak_of_its_process(smollm2_gguf: Path, tmp_path: Path, scheme: str) -> None:
    dequantize(smollm2_gguf, tmp_path / "source")
    asked = ("--scheme", scheme, "--calibration", "embedded", "--samples", 8, "--length", 512)
    planned = _said("plan", tmp_path / "source", *asked)
    ran = _said("quantize", tmp_path / "source", tmp_path / "out", *asked)
    assert planned["peak_ram_bytes"] == pytest.approx(ran["peak_ram_bytes"], rel=0.2)

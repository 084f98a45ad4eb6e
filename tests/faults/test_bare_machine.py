"""Row O7 of the fault table: no compiler, no Triton, an old processor, no network. The whole run works, and says once
what it lacks."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import json, os, socket, subprocess, sys, warnings
from pathlib import Path

for name in sys.argv[3].split():
    sys.modules[name] = None  # makes its import fail

def never(*_, **__):
    raise AssertionError("something was started or fetched")

import torch
import tiny_models
socket.socket.connect = subprocess.Popen.__init__ = os.system = os.posix_spawn = os.fork = never
with warnings.catch_warnings(record=True) as heard:
    warnings.simplefilter("always")
    import leangrid
    recipe, windows = leangrid.Recipe(scheme="NU4"), tiny_models.tokens(2, 16)
    result = leangrid.quantize(sys.argv[1], sys.argv[2], recipe, windows=windows, threads=1)
    model, _ = leangrid.load(sys.argv[2])
    answer = model(tiny_models.tokens(1, 8)).logits
notices = [str(w.message) for w in heard if "leangrid" in str(w.message)]
finite = bool(answer.isfinite().all())
print(json.dumps({"kernels": result.kernels["solve"], "exit": result.exit_code, "notices": notices, "finite": finite}))
"""


@pytest.mark.fault("O7")
@pytest.mark.parametrize(
    ("hidden", "kernels", "path", "notices"),
    [
        pytest.param("leangrid.kernels._cpu triton matplotlib", "", "torch", 1, marks=pytest.mark.slow),
        ("triton", "portable", "cpu-portable", 0),
    ],
)
def test_a_run_without_compiler_triton_or_path(
    hidden: str, kernels: str, path: str, notices: int, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    from leangrid.kernels import native

    if path != "torch" and native._extension() is None:
        pytest.skip("the extension is not built")
    environment = {
        "PATH": "",
        "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT / 'tests' / 'support'}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HOME": str(tmp_path),
        "LEANGRID_KERNELS": kernels,
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tiny("llama2")), str(tmp_path / "out"), hidden],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert (said["kernels"], said["exit"], said["finite"]) == (path, 0, True)
    assert len(said["notices"]) == notices, said

"""The process that quantizes measures its own memory."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="Linux tells")
def test_a_child_reports_its_own_peak_memory(bench: Any) -> None:
    folder = str(ROOT / "benchmarks")
    imports = f"import sys; sys.path.insert(0, {folder!r}); from common.quantize_process import own_peak"
    program = f"{imports}; print(own_peak())"
    ours = np.ones(40_000_000)  # 320 MB that belong to the parent
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert 1e6 < int(done.stdout) < ours.nbytes / 2

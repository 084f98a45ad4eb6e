"""A hundred blocks through kills, a slow disk and a full one; a checkpoint larger than the memory it is given."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _last_line(*command: str | Path) -> dict:
    paths = os.pathsep.join(str(ROOT / folder) for folder in ("src", "tests/support"))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, env=environment, timeout=1800, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.fault("C2")
@pytest.mark.fault("C5")
@pytest.mark.fault("R4")
@pytest.mark.slow
def test_a_long_run_on_its_bad_days(tmp_path: Path) -> None:
    report = _last_line(ROOT / "tests" / "support" / "long_run.py", tmp_path)
    assert report["problems"] == [] and report["blocks"] == 126
    assert report["committed"] == sorted(report["committed"]) and 0 < report["committed"][-1] <= 126


@pytest.mark.fault("R3")
@pytest.mark.slow
def test_a_checkpoint_larger_than_the_memory_it_is_given(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "larger_than_ram.py"
    line = _last_line(
        script, "--gigabytes", "1.5", "--limit", "1.3", "--threads", "1", "--scheme", "GPTQ4", "--folder", tmp_path
    )
    assert line["limit_bytes"] < line["weights_bytes"] and line["blocks"] == 62
    assert line["peak_anonymous_bytes"] < line["peak_data_bytes"] <= line["limit_bytes"]
    assert line["rescues"] == 0 and line["quality"]["passed"]
    assert line["planned_peak_bytes"] == pytest.approx(line["peak_resident_bytes"], rel=0.25)

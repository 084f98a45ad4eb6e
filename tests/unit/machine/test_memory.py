"""The memory that the process may still use: the machine's, the limits of control groups, and its own limits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from leangrid.machine import memory
from leangrid.machine.memory import _left_in_groups

ROOT = Path(__file__).resolve().parents[3]


def _group(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)


def test_groups_of_the_second_generation(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("0::/slurm/job7\n")
    stat = "anon 600\ninactive_file 250\nactive_file 50\n"
    _group(tmp_path / "slurm/job7", {"memory.max": "max\n", "memory.current": "900\n", "memory.stat": stat})
    _group(tmp_path / "slurm", {"memory.max": "1000\n", "memory.current": "900\n", "memory.stat": stat})
    assert _left_in_groups(tmp_path, tmp_path / "mine") == [1000 - 900 + 300], "page cache is not in use"


def test_groups_of_the_first_generation(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("5:cpu:/a\n4:memory:/a/b\n0::/\n")
    stat = "inactive_file 1\nactive_file 1\ntotal_inactive_file 100\ntotal_active_file 20\n"
    for name, limit in (("memory/a/b", "5000"), ("memory/a", "4000"), ("memory", "9223372036854771712")):
        _group(tmp_path / name, {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": "1000", "memory.stat": stat})
    assert min(_left_in_groups(tmp_path, tmp_path / "mine")) == 4000 - 1000 + 120
    assert _left_in_groups(tmp_path, tmp_path / "not Linux") == []


@pytest.mark.parametrize("limit", ["RLIMIT_DATA", pytest.param("RLIMIT_AS", marks=pytest.mark.slow)])
def test_the_process_own_limits(limit: str) -> None:
    program = f"""
import json, resource, torch
from leangrid.machine import memory
before = memory.available_bytes()
resource.setrlimit(resource.{limit}, (3 << 30, 3 << 30))
first = memory.available_bytes()
held = bytearray(500 << 20)
later = memory.available_bytes()
torch.empty(30 << 20, dtype=torch.uint8)  # freed: from now on the C library takes pieces of up to 30 MB from its heap
memory.avoid_heap_holes()
pieces, pins = [], []
for _ in range(16):
    pieces.append(torch.ones(1 << 20))
    pins.append(bytearray(1000))
kept = memory.available_bytes()
pieces.clear()
print(json.dumps([before, first, later, memory.available_bytes() - kept]))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    before, first, later, given_back = json.loads(done.stdout)
    assert given_back > 16 * (4 << 20) - (1 << 20), "freed pieces leave no holes"
    assert later < first < min(before, 3 << 30) and first - later == pytest.approx(500 << 20, rel=0.05)


def test_here() -> None:
    assert 0 < memory.resident_bytes() <= memory.peak_bytes() and memory.available_bytes() > 0

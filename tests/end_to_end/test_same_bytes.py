"""The same recipe gives the bytes that it gave before: tiny runs of every format against hashes that are committed.

The hashes hold for one torch (same_bytes.json says which) on any x86-64 processor. Where a change of bytes is meant,
write them again with ``python tests/end_to_end/test_same_bytes.py`` and say in CHANGELOG.md what changed for whoever
has a recipe."""

import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import same_bytes
import torch

HERE = Path(__file__).resolve().parent
RECORDED = HERE / "same_bytes.json"
SCRIPT = Path(same_bytes.__file__)


def current_hashes(work: Path, *part: str) -> dict[str, dict[str, str]]:
    """The hashes of this working tree, of all runs or of one part of them."""
    paths = os.pathsep.join(str(HERE.parent.parent / folder) for folder in ("src", "tests", "tests/support"))
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(work), *part],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": paths},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("part", ["quick", pytest.param("long", marks=pytest.mark.slow)])
def test_every_format_has_the_bytes_that_were_recorded(part: str, tmp_path: Path) -> None:
    recorded = json.loads(RECORDED.read_text())
    here = {"torch": torch.__version__.partition("+")[0], "machine": platform.machine()}
    if here != recorded["made_with"]:
        pytest.skip(f"hashes were recorded with {recorded['made_with']}, this is {here}")
    wanted = {name: recorded["hashes"][name] for name in same_bytes.runs_of(part)}
    assert current_hashes(tmp_path, part) == wanted
    assert set(recorded["hashes"]) == set(same_bytes.runs_of(None))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as work:
        made = {"torch": torch.__version__.partition("+")[0], "machine": platform.machine()}
        RECORDED.write_text(json.dumps({"made_with": made, "hashes": current_hashes(Path(work))}, indent=1) + "\n")

"""Code in a Python of its own, where nothing is imported yet."""

import os
import subprocess
import sys
from pathlib import Path

import leangrid

SRC = Path(leangrid.__file__).parents[1]


def run_python(code: str, *args: object, path: bool = True) -> subprocess.CompletedProcess[str]:
    """Run ``code``; ``path``: with the package on its path, which an installed one is in any case."""
    env = {**os.environ, "PYTHONPATH": str(SRC) if path else "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], env=env, capture_output=True, text=True, timeout=120, check=False
    )

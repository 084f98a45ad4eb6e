"""The Python of its own in which llama.cpp runs: it has the packages xllamacpp and gguf, which leangrid does not
need."""

import subprocess
import sys
from pathlib import Path

from common.machine import ROOT

WORKER = Path(__file__).with_name("llama_worker.py")


def llama_python(given: str | None) -> Path:
    """The interpreter ``given``, or one that is made in build/venv-llama the first time (from the package index)."""
    if given:
        return Path(given)
    home = ROOT / "build" / "venv-llama"
    if not (home / "bin" / "python").exists():
        subprocess.run([sys.executable, "-m", "venv", home], check=True)
        subprocess.run([home / "bin" / "python", "-m", "pip", "install", "--quiet", "xllamacpp", "gguf"], check=True)
    return home / "bin" / "python"

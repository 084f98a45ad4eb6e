"""Another quantizer as race.py runs it: an environment of its own, and one process for each quantization."""

import shutil
from pathlib import Path
from typing import Any

from common.environment import Environment
from common.machine import ROOT

PEERS = ROOT / "benchmarks" / "peers"  # NAME.txt and run_NAME.py of each


class Peer(Environment):
    """``name`` is that of its list of packages peers/NAME.txt, of its runner peers/run_NAME.py and of its environment's
    folder."""

    def __init__(self, name: str, environments: Path) -> None:
        super().__init__(name, environments, PEERS)

    def quantize(self, job: dict[str, Any], folder: Path) -> dict[str, Any]:
        """Run the peer on a job (source, out, windows, threads, settings, check) and return what its runner
        measured."""
        shutil.rmtree(job["out"], ignore_errors=True)
        return self.run(job, folder)

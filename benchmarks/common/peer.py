"""Another quantizer as race.py sees it: an environment of its own, built once, and one process for each
quantization."""

import shutil
from pathlib import Path
from typing import Any

from common.environment import Environment
from common.machine import ROOT

PEERS = ROOT / "benchmarks" / "peers"  # NAME.txt and run_NAME.py of each


class Peer(Environment):
    """``name`` names peers/NAME.txt (its packages, pinned), peers/run_NAME.py (its runner) and its environment's
    folder."""

    def __init__(self, name: str, environments: Path) -> None:
        super().__init__(name, environments, PEERS)

    def quantize(self, job: dict[str, Any], folder: Path) -> dict[str, Any]:
        """Run the peer on a job (source, out, windows, threads, settings, check); what its runner measured."""
        shutil.rmtree(job["out"], ignore_errors=True)
        return self.run(job, folder)

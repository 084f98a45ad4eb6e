"""Another quantizer as race.py sees it: an environment of its own, built once, and one process for each quantization."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent / "peers"
TAIL = 30  # lines of a failed peer's log that are shown


@dataclass(frozen=True)
class Peer:
    """``name`` names peers/NAME.txt (its packages, pinned), peers/run_NAME.py (its runner) and its environment's folder."""

    name: str
    environments: Path

    @property
    def python(self) -> Path:
        return self.environments / self.name / "bin" / "python"

    def build(self) -> None:
        """Make the environment, unless it stands and was made from the same list; SystemExit with pip's last words where it fails."""
        packages = HERE / f"{self.name}.txt"
        digest = hashlib.sha256(packages.read_bytes()).hexdigest()
        stamp = self.environments / self.name / ".built-from"
        if stamp.is_file() and stamp.read_text(encoding="ascii") == digest:
            return
        print(f"building {self.python.parent.parent}: about 1.5 GB from the package index", file=sys.stderr, flush=True)
        log = self.environments / f"{self.name}.log"
        self.environments.mkdir(parents=True, exist_ok=True)
        install = (str(self.python), "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off")
        with log.open("w", encoding="utf-8") as stream:
            for command in (
                (sys.executable, "-m", "venv", "--clear", str(self.python.parent.parent)),
                # torch first and alone: plain pip picks the build that belongs to this machine, the rest then fits itself to it
                (*install, next(line for line in packages.read_text(encoding="utf-8").split() if line.startswith("torch=="))),
                (*install, "--requirement", str(packages)),
            ):
                if subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, env=_environment(1), check=False).returncode:
                    raise SystemExit(f"{self.name} cannot be installed ({log}):\n{tail(log)}")
        stamp.write_text(digest, encoding="ascii")

    def quantize(self, job: dict[str, Any], folder: Path) -> dict[str, Any]:
        """Run the peer on a job (source, out, windows, threads, settings, check); what its runner measured.

        SystemExit with its last words where it fails.
        """
        result, log = folder / f"{self.name}.json", folder / f"{self.name}.log"
        result.unlink(missing_ok=True)
        shutil.rmtree(job["out"], ignore_errors=True)
        with log.open("w", encoding="utf-8") as stream:
            done = subprocess.run(
                [str(self.python), str(HERE / f"run_{self.name}.py")],
                input=json.dumps(job | {"result": str(result)}),
                text=True,
                stdout=stream,
                stderr=subprocess.STDOUT,
                cwd=folder,  # they leave logs where they stand
                env=_environment(job["threads"]),
                check=False,
            )
        if done.returncode or not result.is_file():
            raise SystemExit(f"{self.name} ended with {done.returncode}:\n{tail(log)}")
        return json.loads(result.read_text(encoding="utf-8"))


def threads_environment(threads: int) -> dict[str, str]:
    """What holds every math library of a process to ``threads``, and to the CPU."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return dict.fromkeys(names, str(threads)) | {"CUDA_VISIBLE_DEVICES": ""}


def _environment(threads: int) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    # GPTQModel's pool of workers: at least 2, or it refuses to start. Nothing is fetched during a run.
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
    return kept | threads_environment(threads) | quiet | {"GPTQMODEL_CPU_WORKERS": str(max(2, threads))}


def tail(log: Path) -> str:
    """The last lines of a log."""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:])

"""The Python environment of another project: built once from its pinned list, and one process in it for each job.

Two comments in a list are read. ``# without: NAME ...`` is uninstalled afterwards (packages that the others ask for and
a CPU cannot load). ``# with: leangrid`` installs this project without its dependencies (the list names those that are
needed); where only this project has changed since, only it is installed again.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.machine import ROOT

TAIL = 30  # lines of a failed process's log that are shown


class EnvironmentFailed(SystemExit):
    """The environment cannot be installed, or its runner failed. The message ends with the last lines of the log."""


@dataclass(frozen=True)
class Environment:
    """``home`` holds NAME.txt (packages, pinned) and run_NAME.py (the runner); the environment is the folder NAME of
    ``environments``."""

    name: str
    environments: Path
    home: Path

    @property
    def python(self) -> Path:
        return self.environments / self.name / "bin" / "python"

    @property
    def packages(self) -> Path:
        return self.home / f"{self.name}.txt"

    def build(self) -> None:
        """Make the environment, unless it exists and was made from the same list. EnvironmentFailed carries pip's last
        lines."""
        wanted = [_digest(files) for files in ([self.packages], _own_files() if self.has_leangrid else []) if files]
        stamp = self.environments / self.name / ".built-from"
        found = stamp.read_text(encoding="ascii").split("\n") if stamp.is_file() else []
        if found == wanted:
            return
        standing = found[:1] == wanted[:1]  # from the same list: only leangrid in it is older
        what = "leangrid anew" if standing else "about 1.5 GB from the package index"
        print(f"building {self.python.parent.parent}: {what}", file=sys.stderr, flush=True)
        log = self.environments / f"{self.name}.log"
        self.environments.mkdir(parents=True, exist_ok=True)
        stamp.unlink(missing_ok=True)
        with log.open("w", encoding="utf-8") as stream:
            for command in [self._leangrid] if standing else self._steps():
                if subprocess.run(
                    command, stdout=stream, stderr=subprocess.STDOUT, env=_environment(1), check=False
                ).returncode:
                    raise EnvironmentFailed(f"{self.name} cannot be installed ({log}):\n{tail(log)}")
        stamp.write_text("\n".join(wanted), encoding="ascii")

    @property
    def has_leangrid(self) -> bool:
        return "leangrid" in self._named("with")

    def _named(self, word: str) -> list[str]:
        found = re.search(rf"^# {word}: (.*)$", self.packages.read_text(encoding="utf-8"), re.MULTILINE)
        return found[1].split() if found else []

    @property
    def _install(self) -> tuple[str, ...]:
        return (str(self.python), "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off")

    @property
    def _leangrid(self) -> tuple[str, ...]:
        return (*self._install, "--no-deps", "--force-reinstall", str(ROOT))

    def _steps(self) -> list[tuple[str, ...]]:
        lines = self.packages.read_text(encoding="utf-8").splitlines()
        steps = [(sys.executable, "-m", "venv", "--clear", str(self.python.parent.parent))]
        # torch first and alone: plain pip picks the build that belongs to this machine, the rest then fits itself to it
        steps += [(*self._install, line.strip()) for line in lines if line.startswith("torch==")]
        steps.append((*self._install, "--requirement", str(self.packages)))
        if unwanted := self._named("without"):
            steps.append((str(self.python), "-m", "pip", "uninstall", "--yes", *unwanted))
        return [*steps, self._leangrid] if self.has_leangrid else steps

    def run(self, job: dict[str, Any], folder: Path) -> dict[str, Any]:
        """Run the runner on ``job`` (with its "threads") in a process that works in ``folder``, and return the JSON
        that it wrote. EnvironmentFailed carries its last lines where it fails."""
        result, log = folder / f"{self.name}.json", folder / f"{self.name}.log"
        result.unlink(missing_ok=True)
        with log.open("w", encoding="utf-8") as stream:
            done = subprocess.run(
                [str(self.python), str(self.home / f"run_{self.name}.py")],
                input=json.dumps(job | {"result": str(result)}),
                text=True,
                stdout=stream,
                stderr=subprocess.STDOUT,
                cwd=folder,  # they leave logs where they stand
                env=_environment(job["threads"]),
                check=False,
            )
        if done.returncode or not result.is_file():
            raise EnvironmentFailed(f"{self.name} ended with {done.returncode}:\n{tail(log)}")
        return json.loads(result.read_text(encoding="utf-8"))


def threads_environment(threads: int) -> dict[str, str]:
    """The environment variables that limit every math library of a process to ``threads`` and hide the GPUs."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return dict.fromkeys(names, str(threads)) | {"CUDA_VISIBLE_DEVICES": ""}


def _environment(threads: int) -> dict[str, str]:
    kept = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    }
    # GPTQModel's pool of workers: at least 2, or it refuses to start. Nothing is fetched during a run.
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
    return kept | threads_environment(threads) | quiet | {"GPTQMODEL_CPU_WORKERS": str(max(2, threads))}


def _digest(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _own_files() -> list[Path]:
    """The files that an installation of this project is made from."""
    kinds = {".py", ".cpp", ".h", ".hpp"}
    sources = [path for path in (ROOT / "src").rglob("*") if path.suffix in kinds]
    return [ROOT / "pyproject.toml", ROOT / "CMakeLists.txt", *sorted(sources)]


def tail(log: Path) -> str:
    """The last lines of a log."""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:])

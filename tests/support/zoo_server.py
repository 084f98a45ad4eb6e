"""A Python that has imported what every type needs and forks a child for each job: a job costs no import, begins where
no other has been, and takes nobody with it when it crashes."""

import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

_MEMORY = 12 * 2**30


class Server:
    """Runs functions of the modules in tests/support, each in a forked child.

    ``imports`` are the modules that the children find imported; ``leangrid`` is not among them unless named.
    """

    def __init__(self, *imports: str) -> None:
        here = Path(__file__).resolve()
        path = os.pathsep.join([str(here.parent), str(here.parents[2] / "src"), os.environ.get("PYTHONPATH", "")])
        env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
               "TOKENIZERS_PARALLELISM": "false"}  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, str(here), *imports], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, text=True
        )

    def run(self, job: str, log: Path, limit: int, **arguments: Any) -> dict[str, Any]:
        """What ``module.function`` returns for ``arguments``: a dict; or one with ``error``, and ``where`` it arose.

        Args:
            job: ``module.function``.
            log: the file that gets what it prints.
            limit: seconds until it is killed.
        """
        assert self._process.stdin and self._process.stdout
        told = {"job": job, "log": str(log), "limit": limit, "arguments": arguments}
        self._process.stdin.write(json.dumps(told) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        return json.loads(answer) if answer else {"error": "the server is gone", "where": job}

    def close(self) -> None:
        """End the server."""
        if self._process.stdin:
            self._process.stdin.close()
        self._process.wait(60)


def _serve(imports: list[str]) -> None:
    import torch

    torch.set_num_threads(1)
    for name in imports:
        importlib.import_module(name)
    for line in sys.stdin:
        told = json.loads(line)
        answer = Path(told["log"]).with_suffix(".answer")
        answer.unlink(missing_ok=True)
        pid = os.fork()
        if pid == 0:
            _child(told, answer)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        found = json.loads(answer.read_text()) if answer.is_file() else _died(status, told["limit"])
        print(json.dumps(found), flush=True)


def _died(status: int, limit: int) -> dict[str, Any]:
    over = status == -signal.SIGALRM
    return {"error": f"took more than {limit} s" if over else f"died with status {status}", "where": ""}


def _child(told: dict[str, Any], answer: Path) -> None:
    import torch

    torch.set_num_threads(1)  # makes torch's pool of threads anew, before several threads of a reader do so at once
    try:
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
        signal.alarm(told["limit"])
        log = os.open(told["log"], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        began = time.time()
        try:
            module, _, function = told["job"].rpartition(".")
            found = getattr(importlib.import_module(module), function)(**told["arguments"])
        except BaseException as error:
            traceback.print_exc()
            cause = error.__cause__ if type(error).__name__ == "CheckpointError" and error.__cause__ else error
            frames = traceback.extract_tb(cause.__traceback__)[-3:]
            found = {
                "error": f"{type(error).__name__}: {error}"[:600],
                "refused": type(error).__module__ == "leangrid.errors",
                "where": " ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames),
            }
        answer.write_text(json.dumps({**found, "seconds": round(time.time() - began, 2)}))
    finally:
        os._exit(0)


if __name__ == "__main__":
    _serve(sys.argv[1:])

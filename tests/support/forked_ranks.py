"""The processes that torchrun would have started, forked: each begins with everything imported, where a new Python
would take seconds."""

import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from leangrid.cli.app import app
from leangrid.errors import LeangridError
from leangrid.storage import failpoints


@dataclass(frozen=True)
class Ended:
    """How one rank ended: its exit status (-9 where it was killed), and all it said."""

    status: int
    said: str


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(rank: int, count: int, port: int, job: Callable[[], object], said: Path, failpoint: str | None = None) -> int:
    """Fork ``rank`` of ``count``, which does ``job`` and writes what it says into the file ``said``; its process id."""
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        sys.stdout = sys.stderr = said.open("w", buffering=1)
        os.dup2(sys.stdout.fileno(), 1)
        os.dup2(sys.stdout.fileno(), 2)
        torch.set_num_threads(1)  # the parent's other threads do not exist here: waiting for one would never end
        failpoints.reset()
        os.environ |= {
            "RANK": str(rank),
            "WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        os.environ.pop("LEANGRID_FAILPOINT", None)
        if failpoint:
            os.environ["LEANGRID_FAILPOINT"] = failpoint
        job()
        status = 0
    except SystemExit as ended:
        status = int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def run(
    count: int,
    job: Callable[[int], object],
    failing: Mapping[int, str] | None = None,
    kill: tuple[int, Callable[[], bool]] | None = None,
    within: float = 60,
) -> list[Ended]:
    """``job(rank)`` on every rank, some with a failpoint, one killed as soon as its condition holds.

    AssertionError where a rank is still there after ``within`` seconds.
    """
    failing, port = failing or {}, free_port()
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, str(rank)) for rank in range(count)]
        # Rank 0 last: torch's store is in its process, and the others wait for it.
        left = {
            start(rank, count, port, lambda rank=rank: job(rank), files[rank], failing.get(rank)): rank
            for rank in reversed(range(count))
        }
        ended: dict[int, int] = {}
        began = time.monotonic()
        try:
            while left and time.monotonic() < began + within:
                for pid in list(left):
                    if kill is not None and left[pid] == kill[0] and kill[1]():
                        os.kill(pid, signal.SIGKILL)
                    found, status = os.waitpid(pid, os.WNOHANG)
                    if found:
                        ended[left.pop(pid)] = os.waitstatus_to_exitcode(status)
                time.sleep(0.01)
            stuck = sorted(left.values())
        finally:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        results = [
            Ended(ended.get(rank, -9), file.read_text() if file.exists() else "") for rank, file in enumerate(files)
        ]
    assert not stuck, f"ranks {stuck} did not end: {results}"
    return results


def as_command(job: Callable[[int], object]) -> Callable[[int], object]:
    """``job`` that ends as the command line does, for what no option asks for: a LeangridError's sentence and exit
    code."""

    def ending(rank: int) -> object:
        try:
            return job(rank)
        except LeangridError as error:
            print(f"error: {error}")
            raise SystemExit(error.exit_code) from None

    return ending


def command(*words: Any) -> Callable[[int], object]:
    """The command line ``leangrid WORDS...``, as a job for every rank."""

    def job(rank: int) -> object:
        sys.argv = ["leangrid", *map(str, words)]
        return app(sys.argv[1:], prog_name="leangrid")

    return job

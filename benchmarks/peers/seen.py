"""What a peer's runner measures besides its answer: the token ids that went in, CPU seconds and peak memory.

It needs only torch and safetensors. race.py starts the runners with the Python of the peer's own environment, one
process for each quantization: a JSON job on stdin, the result as JSON in the file that the job names (peers print on
stdout).
"""

import json
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


class Tokens:
    """Records every batch of ids that any embedding of the process looks up. It replaces the method of torch's own
    class, since peers copy and rebuild models."""

    def __init__(self) -> None:
        self.batches: list[Tensor] = []
        forward = torch.nn.Embedding.forward

        def recorded(layer: torch.nn.Embedding, ids: Tensor) -> Tensor:
            self.batches.append(ids.detach().cpu().clone())
            return forward(layer, ids)

        torch.nn.Embedding.forward = recorded  # type: ignore[method-assign]

    def check(self, windows: Tensor) -> int:
        """The number of tokens in all passes. RuntimeError unless every pass saw exactly ``windows``, in any order:
        nothing padded, cut, dropped or tokenized again."""
        if not self.batches:
            raise RuntimeError("the model was never run on the calibration windows")
        if any(batch.shape[-1] != windows.shape[1] for batch in self.batches):
            raise RuntimeError(
                f"windows of {sorted({batch.shape[-1] for batch in self.batches})} tokens, not {windows.shape[1]}"
            )
        found = torch.cat([batch.reshape(-1, windows.shape[1]) for batch in self.batches])
        unique, counts = torch.unique(found, dim=0, return_counts=True)
        wanted, once = torch.unique(windows, dim=0, return_counts=True)
        if not torch.equal(unique, wanted) or not bool((counts * once[0] == counts[0] * once).all()):
            raise RuntimeError(
                f"{len(unique)} different windows in {len(found)} were seen, not the {len(wanted)} of the job"
            )
        return found.numel()


class Stopwatch:
    """Wall and CPU seconds of named stages; CPU includes finished child processes."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        begin, cpu = time.perf_counter(), cpu_seconds()
        yield
        self.seconds[stage] = round(time.perf_counter() - begin, 3)
        self.cpu_seconds[stage] = round(cpu_seconds() - cpu, 3)


def cpu_seconds() -> float:
    """User and system seconds of this process and its finished children."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def peak_bytes() -> int:
    """Largest resident size of this process since it began."""
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def job() -> tuple[dict[str, Any], Tensor]:
    """The job on stdin, and its windows, int64 [windows, length]. torch is limited to the job's threads."""
    read = json.load(sys.stdin)
    torch.set_num_threads(read["threads"])
    return read, load_file(read["windows"])["windows"]


def finish(read: dict[str, Any], watch: Stopwatch, tokens: int, package: str, logits: Any) -> None:
    """Write the result, and the logits that ``logits()`` returns: the peer's own answer to the first window, with which
    our reading of its file is compared."""
    result = {
        "seconds": watch.seconds,
        "cpu_seconds": watch.cpu_seconds,
        "process_cpu_seconds": round(cpu_seconds(), 3),
        "peak_ram_bytes": peak_bytes(),
        "tokens_seen": tokens,
        "peer_versions": {name: version(name) for name in (package, "torch", "transformers", "numpy")},
    }
    if read["check"]:
        save_file({"logits": logits().float().contiguous()}, read["check"])
    Path(read["result"]).write_text(json.dumps(result), encoding="utf-8")

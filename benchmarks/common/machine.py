"""The command, versions, machine and date that every result line holds."""

import contextlib
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import leangrid

ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("torch", "transformers", "tokenizers", "compressed-tensors", "numpy")
# What decides which kernels run; the rest of the list says nothing about speed here.
_FLAGS = ("avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8",
          "asimd", "asimddp", "i8mm", "bf16", "sve", "sve2")  # fmt: skip


def provenance(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """{"command", "versions", "machine", "date"} of this process. ``arguments`` replaces ``sys.argv``."""
    return {
        "command": command(sys.argv if arguments is None else arguments),
        "versions": versions(),
        "machine": machine(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def command(arguments: Sequence[str]) -> str:
    """The command line as a person types it in the project's root. Of a path outside the project only the last name is
    kept: its folders mean nothing on another machine, and the line has the sha256 of what was read."""
    return shlex.join(["python", *(shown(argument) for argument in arguments)])


def shown(argument: str) -> str:
    """``argument`` with a path inside the project written from its root, and a path outside it by its last name."""
    if "=" in argument and argument.startswith("--"):
        option, _, value = argument.partition("=")
        return f"{option}={shown(value)}"
    if "/" not in argument or not (argument.startswith(("/", "~", ".")) or Path(argument).exists()):
        return argument
    path = Path(os.path.abspath(Path(argument).expanduser()))
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that decide the numbers, and the commit (with "+" where files differ
    from it)."""
    found = {"python": platform.python_version(), "leangrid": leangrid.__version__, "commit": _commit()}
    for name in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return {name: text for name, text in found.items() if text}


def _commit() -> str:
    git = ("git", "-C", str(ROOT))
    head = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=False)
    if head.returncode:
        return ""
    # Results do not count: the line that is being written is one of them.
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--", ".", ":!benchmarks/results", ":!experiments/results"],
        capture_output=True,
        text=True,
        check=False,
    )
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def machine() -> dict[str, Any]:
    """Processor, number of cores that this process may use, instruction sets, memory in GiB, and the GPU where there is
    one."""
    facts = _cpuinfo()
    flags = set(facts.get("flags", facts.get("Features", "")).split())
    found = {
        "cpu": facts.get("model name") or platform.processor() or platform.machine(),
        "cores": _cores(),
        "isa": [flag for flag in _FLAGS if flag in flags],
        "memory_gib": _memory_gib(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    gpu = _gpu()
    return found | ({"gpu": gpu} if gpu else {})


def _cpuinfo() -> dict[str, str]:
    """The fields of the first processor in /proc/cpuinfo; empty where there is no such file."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n\n")[0].splitlines()
    pairs = (line.partition(":") for line in lines if ":" in line)
    return {name.strip(): value.strip() for name, _, value in pairs}


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    except (AttributeError, ValueError, OSError):  # not told on this system
        return None


def _gpu() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""

"""What every test gets: shapes checked as it runs, no network, few threads, tiny checkpoints made once a session."""

import importlib
import os
import socket
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read by huggingface_hub and datasets when they are imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import type_checks

type_checks.install()

import hypothesis
import pytest
import tiny_models
import torch

ROOT = Path(__file__).resolve().parents[1]

for _profile, _settings in {
    "dev": {"max_examples": 25, "derandomize": True},
    "ci": {"max_examples": 200, "derandomize": True},
    "nightly": {"max_examples": 10_000},
}.items():
    hypothesis.settings.register_profile(_profile, deadline=None, **_settings)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


def pytest_configure() -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", min(2, os.cpu_count() or 1))))


class NetworkBlocked(ConnectionError):
    """A test tried to reach the network."""


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """No connection leaves this machine; loopback and unix sockets stay (gloo, multiprocessing)."""
    connect, lookup = socket.socket.connect, socket.getaddrinfo
    local = ("localhost", "127.0.0.1", "::1", "", None)

    def guarded_connect(self: socket.socket, address: object) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and isinstance(address, tuple) and address[0] not in local:
            raise NetworkBlocked(f"tests have no network, but something connects to {address}")
        connect(self, address)  # pyright: ignore[reportArgumentType]

    def guarded_lookup(host: object, *rest: object, **named: object) -> list:
        if host not in local and host != socket.gethostname():
            raise socket.gaierror(socket.EAI_AGAIN, f"tests have no network, but something looks up {host}")
        return lookup(host, *rest, **named)  # pyright: ignore[reportCallIssue, reportArgumentType]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded_connect)
        patch.setattr(socket, "getaddrinfo", guarded_lookup)
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``tiny("llama3", dtype=..., sharded=...)`` -> a checkpoint directory, made once a session: read it, never write
    into it."""
    made: dict[tuple, Path] = {}

    def checkpoint(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, sharded: bool = False) -> Path:
        key = (name, dtype, seed, sharded)
        if key not in made:
            made[key] = tiny_models.save(name, tmp_path_factory.mktemp(name), dtype, seed, sharded)
        return made[key]

    return checkpoint


@pytest.fixture
def in_memory(tmp_path: Path) -> Iterator[Path]:
    """An empty directory in memory where there is such a file system: for tests that sync thousands of files."""
    memory = "/dev/shm"  # noqa: S108
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as directory:
        yield Path(directory)


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """fsync returns at once, in this process and in those that are forked from it. Which files a run syncs, and in
    which order, is checked from its calls (tests/support/power_loss.py); no test cuts the power of this machine."""

    def fsync(file: int | Any) -> None:
        os.fstat(file if isinstance(file, int) else file.fileno())  # OSError where it is not open

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        yield


def _fetched(folder: str, pattern: str) -> Path:
    found = sorted((ROOT / ".models" / folder).glob(pattern))
    if not found:
        pytest.skip(f".models/{folder} is not here; `make models` fetches it")
    return found[0]


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The demo model as it is published: one .gguf file (SmolLM2-135M-Instruct, Q4_1)."""
    return _fetched("smollm2", "*.gguf")


@pytest.fixture(scope="session")
def minilm() -> Path:
    """all-MiniLM-L6-v2, a sentence encoder with real float32 weights: a checkpoint directory."""
    return _fetched("minilm", "config.json").parent


@pytest.fixture(params=["portable", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Sends CPU tensors to one instruction set; skips what this processor (or an installation without a compiler)
    lacks."""
    from leangrid.errors import RecipeError
    from leangrid.kernels import native

    monkeypatch.setenv("LEANGRID_KERNELS", request.param)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if not native.available():
                pytest.skip("the extension is not built")
    except RecipeError:
        pytest.skip(f"no {request.param} here")
    return request.param


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """``bench("common.machine")`` -> benchmarks/common/machine.py, imported as the scripts import it;
    ``bench("measure.sizes")`` -> experiments/measure/sizes.py, ``bench("seen")`` -> benchmarks/peers/seen.py."""
    folders = [ROOT / "benchmarks" / "peers", ROOT / "experiments", ROOT / "benchmarks"]
    before = set(sys.modules)
    for folder in folders:
        monkeypatch.syspath_prepend(str(folder))
    yield importlib.import_module
    for name in set(sys.modules) - before:  # another test gets them new: some are changed by monkeypatch
        file = getattr(sys.modules[name], "__file__", None)
        if file is not None and any(Path(file).is_relative_to(folder) for folder in folders):
            del sys.modules[name]

"""Several ranks as real processes over loopback: the same bytes twice, and what is refused or stops them."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import tiny_models
from tiny_run import digest


def ranks(source: Path, out: Path, count: int, *more: str, different: tuple[str, ...] = ()) -> list[tuple[int, str]]:
    """Quantize with ``count`` ranks, the last one with ``different`` options too; exit code and what was said, a rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    text = out.parent / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 400)
    started = []
    for rank in range(count):
        where = {"RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        options = ["--calibration", str(text), "--samples", "4", "--length", "32", *more, *(different if rank == count - 1 else ())]
        command = [sys.executable, "-m", "leangrid", "quantize", str(source), str(out), *options]
        started.append(subprocess.Popen(command, env=os.environ | where, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    try:
        return [(code, said) for said, code in [(one.communicate(timeout=120)[0], one.returncode) for one in started]]
    finally:
        for one in started:
            one.kill()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save("llama1", tmp_path_factory.mktemp("ranks") / "llama")


@pytest.mark.slow
def test_two_ranks_give_the_same_bytes_twice(source: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        ended = ranks(source, tmp_path / name, 2)
        assert [code for code, _ in ended] == [0, 0], ended
        assert not ended[1][1].strip(), "rank 0 alone speaks"
    weights = [{n: h for n, h in digest(tmp_path / name).items() if n.endswith(".safetensors")} for name in ("a", "b")]
    assert weights[0] and weights[0] == weights[1]


@pytest.mark.fault("R5")
def test_ranks_that_disagree_refuse(source: Path, tmp_path: Path) -> None:
    ended = ranks(source, tmp_path / "out", 2, different=("--seed", "7"))
    assert all(code == 2 and "rank 1 and rank 0 differ in recipe" in said for code, said in ended), ended
    assert not list(tmp_path.glob("out*"))


@pytest.mark.slow
def test_fewer_windows_than_ranks_are_refused(source: Path, tmp_path: Path) -> None:
    ended = ranks(source, tmp_path / "out", 2, "--samples", "1")
    assert all(code == 2 and "1 calibration windows for 2 ranks" in said for code, said in ended), ended
    assert not list(tmp_path.glob("out*"))

"""storage/safetensors.py against the reference library, both ways, and its memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch as reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from leangrid.errors import CheckpointError, FormatError
from leangrid.storage import files, safetensors
from leangrid.storage.dtypes import DTYPES

SHARED_DTYPES = [
    d for d in DTYPES.values() if d not in (torch.complex64, torch.float8_e8m0fnu)
]  # both newer than some readers


def tensor(dtype: torch.dtype, shape: list[int], seed: int) -> Tensor:
    """A tensor of random bits, with NaN payloads among them (bool: 0 and 1)."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    count = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(0, 256, (count,), generator=generator, dtype=torch.uint8).view(dtype).reshape(shape)


def same(a: Tensor, b: Tensor) -> bool:
    flat = [x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*flat)


shapes = st.lists(st.integers(0, 5), max_size=4)
collections = st.dictionaries(
    st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=8),
    st.tuples(st.sampled_from(SHARED_DTYPES), shapes),
    max_size=6,
)


@given(collections, st.integers(0, 2**31))
def test_round_trips_with_the_reference_library(
    tmp_path_factory: pytest.TempPathFactory, kinds: dict, seed: int
) -> None:
    directory = tmp_path_factory.mktemp("round")
    tensors = {name: tensor(dtype, shape, seed) for name, (dtype, shape) in kinds.items()}
    sha256 = safetensors.save(directory / "ours", tensors, {"format": "pt"})
    assert sha256 == files.hash_file(directory / "ours")
    theirs, ours = reference.load_file(directory / "ours"), safetensors.load(directory / "ours", sha256)
    reference.save_file(tensors, directory / "theirs", {"format": "pt"})
    back = safetensors.load(directory / "theirs")
    assert set(theirs) == set(ours) == set(back) == set(tensors)
    for name, expected in tensors.items():
        assert same(theirs[name], expected) and same(ours[name], expected) and same(back[name], expected)


def test_views_transposes_and_scalars(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "transposed": base.t(),
        "strided": base[::2, 1:],
        "scalar": torch.tensor(3, dtype=torch.int8),
        "shared": base,
        "again": base,
    }
    safetensors.save(tmp_path / "file", tensors)
    for name, got in reference.load_file(tmp_path / "file").items():
        assert torch.equal(got, tensors[name])


def test_every_tensor_is_aligned_and_equal_tensors_give_equal_bytes(tmp_path: Path) -> None:
    tensors = {
        "a": torch.ones(3, dtype=torch.uint8),
        "b": torch.ones(3, dtype=torch.float64),
        "c": torch.ones(5, dtype=torch.bfloat16),
    }
    first = safetensors.save(tmp_path / "first", tensors, {"format": "pt"})
    assert first == safetensors.save(tmp_path / "second", dict(reversed(tensors.items())), {"format": "pt"})
    for info in safetensors.read_tensor_infos(tmp_path / "first").values():
        assert info.start % info.torch_dtype.itemsize == 0
    with safe_open(tmp_path / "first", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_tensors_are_copied_from_other_files(tmp_path: Path) -> None:
    weight = torch.randn(7, 5).bfloat16()
    safetensors.save(tmp_path / "a", {"x": weight, "y": torch.arange(3)})
    where = safetensors.read_tensor_infos(tmp_path / "a")
    assert where["x"].nbytes == 70 and where["x"].shape == (7, 5) and where["x"].torch_dtype == torch.bfloat16
    safetensors.save(tmp_path / "b", {"renamed": where["x"], "new": torch.ones(2)})
    assert torch.equal(reference.load_file(tmp_path / "b")["renamed"], weight)


def test_load_refuses_another_hash(tmp_path: Path) -> None:
    sha256 = safetensors.save(tmp_path / "file", {"x": torch.zeros(100)})
    data = bytearray((tmp_path / "file").read_bytes())
    data[-1] ^= 1
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(CheckpointError, match="sha256"):
        safetensors.load(tmp_path / "file", sha256)
    assert safetensors.load(tmp_path / "file")["x"][-1] != 0


def test_what_cannot_be_held(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"complex128.*'x'"):
        safetensors.save(tmp_path / "file", {"x": torch.zeros(1, dtype=torch.complex128)})
    with pytest.raises(FormatError, match="__metadata__"):
        safetensors.save(tmp_path / "file", {"__metadata__": torch.zeros(1)})
    assert list(tmp_path.iterdir()) == []


def test_copying_holds_a_chunk_not_a_tensor(tmp_path: Path) -> None:
    """128 MB of one tensor go from file to file within 32 MB of address space more than the program has."""
    program = """
import json, os, resource, struct, sys
from pathlib import Path
from leangrid.storage import safetensors
source, target, size = Path(sys.argv[1]), Path(sys.argv[2]), 1 << 27
text = json.dumps({"x": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
with source.open("wb") as file:
    file.write(struct.pack("<Q", len(text)) + text)
    file.truncate(8 + len(text) + size)
pages = int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + (32 << 20),) * 2)
safetensors.save(target, {"y": safetensors.read_tensor_infos(source)["x"]})
print(safetensors.read_tensor_infos(target)["y"].nbytes)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(safetensors.__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "a"), str(tmp_path / "b")],
        capture_output=True,
        text=True,
        env=environment,
    )
    (tmp_path / "b").unlink(missing_ok=True)
    assert done.stdout.strip() == str(1 << 27), done.stderr

"""storage/mapped.py: the same bytes, no file left behind, and a full disk is an error, not a signal."""

import errno
import gc
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from leangrid.errors import OutputError
from leangrid.storage import files
from leangrid.storage.mapped import MappedTensors

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_what_is_kept_is_taken_again(dtype: torch.dtype, tmp_path: Path) -> None:
    mapped, tensor = MappedTensors(tmp_path), torch.arange(3 * 5 * 7).view(3, 5, 7).to(dtype)
    kept = mapped.store(tensor)
    assert kept.dtype == dtype and kept.shape == tensor.shape and torch.equal(kept, tensor)
    assert list(tmp_path.iterdir()) == [], "the files have no names"
    assert mapped.store(kept) is kept and all(mapped.store(part) is part for part in kept.split(1))
    taken, part = mapped.load_copy(kept, CPU), mapped.load_copy(kept.split(1)[2], CPU)
    kept.zero_()
    assert torch.equal(taken, tensor) and torch.equal(part, tensor[2:])


def _mapped_bytes() -> int:
    return sum(
        line.endswith("(deleted)") for line in Path("/proc/self/maps").read_text().splitlines() if ".scratch." in line
    )


def test_space_goes_back_with_the_last_reference(tmp_path: Path) -> None:
    mapped, before = MappedTensors(tmp_path), _mapped_bytes()
    kept = mapped.store(torch.ones(1000))
    part = kept[10:]
    del kept
    gc.collect()
    assert _mapped_bytes() == before + 1 and float(part.sum()) == 990
    del part
    gc.collect()
    assert _mapped_bytes() == before


def test_pages_are_let_go_after_each_use(tmp_path: Path) -> None:
    def shared() -> int:
        return int(Path("/proc/self/statm").read_text().split()[2]) * os.sysconf("SC_PAGE_SIZE")

    mapped, size = MappedTensors(tmp_path), 64 << 20
    before = shared()
    kept = mapped.store(torch.ones(size // 4))
    assert shared() - before < size // 4
    taken = mapped.load_copy(kept, CPU)
    assert shared() - before < size // 4 and float(taken.sum()) == size // 4


@pytest.mark.fault("C5")
def test_a_full_disk_is_an_error_that_can_be_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

        def posix_fallocate(self, *_: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "os", Full())
    with pytest.raises(
        OutputError, match=r"cannot reserve the file: No space left on device; it needs 4000 bytes, .* free"
    ) as caught:
        MappedTensors(tmp_path).store(torch.ones(1000))
    assert caught.value.exit_code == 3 and list(tmp_path.iterdir()) == []

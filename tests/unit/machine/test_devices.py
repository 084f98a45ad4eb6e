"""What there is to test of a device where there is none: the CPU's answers, the words of missing memory, reading
ahead."""

from pathlib import Path

import pytest
import tiny_models
import torch

from leangrid.errors import LeangridError
from leangrid.machine import devices
from leangrid.machine.arithmetic import best_products, compute_dtype, products
from leangrid.models.prefetch import Ahead
from leangrid.models.skeleton import Skeleton
from leangrid.storage.source import open_source


def test_devices_are_checked_by_name() -> None:
    assert (
        devices.checked("cpu") == torch.device("cpu")
        and not devices.accelerated("cpu")
        and devices.accelerated("cuda:1")
    )
    for wrong in ("gpu", "meta", "cuda:99"):
        with pytest.raises(LeangridError, match=wrong):
            devices.checked(wrong)


def test_the_cpu_has_no_memory_of_its_own() -> None:
    devices.start_counting("cpu")
    devices.release_cached("cpu")
    devices.wait("cpu")
    tensor = torch.ones(3)
    assert (
        devices.peak_bytes("cpu") == 0 and devices.available_bytes("cpu") > 2**20 and devices.to_host(tensor) is tensor
    )
    clock = devices.DeviceClock("cpu")
    with clock.stage("factor"):
        torch.ones(100, 100) @ torch.ones(100, 100)
    assert clock.seconds["factor"] > 0


def test_missing_memory_is_told_from_other_errors() -> None:
    assert devices.out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert devices.out_of_memory(
        RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`")
    )
    assert not devices.out_of_memory(RuntimeError("expected scalar type Float")) and not devices.out_of_memory(
        MemoryError()
    )


def test_arithmetic_on_a_device() -> None:
    assert [best_products(dtype, "cuda") for dtype in (torch.bfloat16, torch.float16, torch.float32)] == [
        "bfloat16",
        "tfloat32",
        "tfloat32",
    ]
    assert compute_dtype("bfloat16", torch.bfloat16) == torch.bfloat16
    assert compute_dtype("float32", torch.bfloat16) == compute_dtype("tfloat32", torch.float32) == torch.float32


@pytest.mark.fault("N7")
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "tfloat32"])
def test_blocks_are_never_computed_in_float16(kind: str) -> None:
    assert compute_dtype(kind, torch.float16) == torch.float32


def test_products_are_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    setting = torch.backends.cuda.matmul
    before = setting.fp32_precision
    with products("tfloat32"):
        assert setting.fp32_precision == "tf32"
    with products("float32"):
        assert setting.fp32_precision == before
    with pytest.raises(KeyError), products("bfloat16"):
        raise KeyError
    assert setting.fp32_precision == before


def test_a_block_read_ahead_is_the_block(tmp_path: Path) -> None:
    skeleton = Skeleton(open_source(tiny_models.save("qwen2", tmp_path, sharded=True)))
    ahead = Ahead(skeleton, "cpu")
    assert ahead.take(0) is None
    ahead.start(1)
    weights = ahead.take(1)
    assert weights is not None and ahead.take(1) is None
    with skeleton.block(1, weights=weights) as block:
        model = tiny_models.build("qwen2")
        for name, parameter in block.named_parameters():
            assert torch.equal(parameter, model.get_parameter(f"{skeleton.block_name(1)}.{name}")), name
    assert all(p.is_meta for p in skeleton.blocks.parameters())
    ahead.start(2)  # there is no third block
    assert ahead.take(2) is None
    ahead.start(0)
    ahead.close()


def test_an_error_of_reading_ahead_comes_when_the_block_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skeleton = Skeleton(open_source(tiny_models.save("llama2", tmp_path)))

    def broken(_name: str) -> torch.Tensor:
        raise LeangridError("the disk is gone")

    ahead = Ahead(skeleton, "cpu")
    monkeypatch.setattr(skeleton, "stored", broken)
    ahead.start(1)
    with pytest.raises(LeangridError, match="disk is gone"):
        ahead.take(1)
    ahead.start(1)
    ahead.close()  # nobody asked: nothing is raised

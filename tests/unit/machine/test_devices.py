"""machine/devices.py and arithmetic.py without a CUDA device."""

import pytest
import torch

from leangrid.errors import LeangridError
from leangrid.machine import devices
from leangrid.machine.arithmetic import choose_compute_dtype, choose_products, use_products


def test_devices_are_checked_by_name() -> None:
    assert (
        devices.parse_device("cpu") == torch.device("cpu")
        and not devices.has_own_memory("cpu")
        and devices.has_own_memory("cuda:1")
    )
    for wrong in ("gpu", "meta", "cuda:99"):
        with pytest.raises(LeangridError, match=wrong):
            devices.parse_device(wrong)


def test_the_cpu_has_no_memory_of_its_own() -> None:
    devices.reset_peak_device_bytes("cpu")
    devices.release_cached_memory("cpu")
    devices.synchronize("cpu")
    tensor = torch.ones(3)
    assert (
        devices.peak_device_bytes("cpu") == 0
        and devices.usable_device_bytes("cpu") > 2**20
        and devices.copy_to_host(tensor) is tensor
    )
    clock = devices.DeviceClock("cpu")
    with clock.stage("factor"):
        torch.ones(100, 100) @ torch.ones(100, 100)
    assert clock.seconds["factor"] > 0


def test_missing_memory_is_told_from_other_errors() -> None:
    assert devices.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert devices.is_out_of_memory(
        RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`")
    )
    assert not devices.is_out_of_memory(RuntimeError("expected scalar type Float")) and not devices.is_out_of_memory(
        MemoryError()
    )


def test_arithmetic_on_a_device() -> None:
    assert [choose_products(dtype, "cuda") for dtype in (torch.bfloat16, torch.float16, torch.float32)] == [
        "bfloat16",
        "tfloat32",
        "tfloat32",
    ]
    assert choose_compute_dtype("bfloat16", torch.bfloat16) == torch.bfloat16
    assert (
        choose_compute_dtype("float32", torch.bfloat16)
        == choose_compute_dtype("tfloat32", torch.float32)
        == torch.float32
    )


@pytest.mark.fault("N7")
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "tfloat32"])
def test_blocks_are_never_computed_in_float16(kind: str) -> None:
    assert choose_compute_dtype(kind, torch.float16) == torch.float32


def test_products_are_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    setting = torch.backends.cuda.matmul
    before = setting.fp32_precision
    with use_products("tfloat32"):
        assert setting.fp32_precision == "tf32"
    with use_products("float32"):
        assert setting.fp32_precision == before
    with pytest.raises(KeyError), use_products("bfloat16"):
        raise KeyError
    assert setting.fp32_precision == before

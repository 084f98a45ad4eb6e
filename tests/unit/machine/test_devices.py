"""machine/devices.py and arithmetic.py without a CUDA device."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import leangrid
from leangrid.errors import LeangridError
from leangrid.machine import devices
from leangrid.machine.arithmetic import choose_compute_dtype, choose_products, use_products

_MKLDNN: Any = torch.backends.mkldnn  # whose attributes checkers do not see


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
    for words in (
        "Triton Error [CUDA]: out of memory",
        "CUDA driver error: out of memory",
        "CUDA error: out of memory",
    ):
        assert devices.is_out_of_memory(RuntimeError(words))
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


@pytest.mark.parametrize("chosen", ["highest", "high", "medium"])  # by whoever shares the process
def test_float32_is_ieee_whatever_the_process_has_chosen_and_its_choice_stays(chosen: str) -> None:
    settings = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, _MKLDNN.matmul)
    of_cuda, of_cpu = {"float32": "ieee", "bfloat16": "tf32", "tfloat32": "tf32"}, {"bfloat16": "bf16"}
    former = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(chosen)
    try:
        before = [setting.fp32_precision for setting in settings]
        for kind, cuda in of_cuda.items():
            with pytest.raises(KeyError), use_products(kind):
                assert [one.fp32_precision for one in settings] == [cuda, cuda, of_cpu.get(kind, "ieee")]
                raise KeyError
            assert [setting.fp32_precision for setting in settings] == before
            assert torch.get_float32_matmul_precision() == chosen
    finally:
        torch.set_float32_matmul_precision(former)


class _Precisions(TorchDispatchMode):
    """What the CPU's float32 products may be rounded to, at each product."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "mm" in func.__name__:
            self.seen.append(_MKLDNN.matmul.fp32_precision)
        return func(*args, **kwargs or {})


def test_linears_are_solved_in_float32_though_the_process_multiplies_in_bfloat16() -> None:
    weight, inputs = torch.randn(48, 256), torch.randn(512, 256)
    hessian, former, products = inputs.T @ inputs, torch.get_float32_matmul_precision(), _Precisions()
    torch.set_float32_matmul_precision("medium")
    try:
        with products:
            leangrid.quantize_linear(weight, hessian, "W4A16_G64")
        assert _MKLDNN.matmul.fp32_precision == "bf16"
    finally:
        torch.set_float32_matmul_precision(former)
    assert set(products.seen) == {"ieee"} and len(products.seen) > 5


def test_what_decides_the_bits_of_a_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(name="NVIDIA X", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert devices.describe_gpu("cpu") is None
    assert devices.describe_gpu("cuda") == "NVIDIA X, capability 9.0, CUDA 13.0"


def test_a_card_without_bfloat16_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = {0: ("NVIDIA H200", (9, 0)), 1: ("Tesla T4", (7, 5))}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: cards[device.index or 0][0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: cards[device.index or 0][1])
    assert devices.parse_device("cuda") == torch.device("cuda")
    with pytest.raises(LeangridError, match=r"Tesla T4 has compute capability 7\.5, and the kernels need 8\.0"):
        devices.parse_device("cuda:1")

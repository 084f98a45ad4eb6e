"""What differs between the CPU and a CUDA device: its memory, and that its work is asynchronous."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from leangrid.errors import LeangridError, RecipeError
from leangrid.machine import memory
from leangrid.machine.stopwatch import Clock

# Parts of the messages of errors other than torch.OutOfMemoryError that mean a lack of memory.
_NO_MEMORY = (
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "Triton Error [CUDA]: out of memory",  # while a kernel is loaded or launched
    "DefaultCPUAllocator",
)
# The part of the free memory that a run plans with, on a device and on the CPU. The rest is for fragmentation in the
# allocator, and on a device for the workspaces of libraries.
_USABLE, _USABLE_HOST = 0.94, 0.9
_CAPABILITY = (8, 0)  # with bfloat16: Ampere and later


def parse_device(device: str) -> torch.device:
    """``device``, such as ``cuda:1``, as a torch.device.

    Raises LeangridError if it is no device, neither cpu nor cuda, not on this machine, or older than Ampere."""
    try:
        found = torch.device(device)
    except RuntimeError:
        raise LeangridError(f"'{device}' is no device", "--device", "Use cpu, cuda or cuda:1") from None
    if found.type not in ("cpu", "cuda"):
        raise LeangridError(f"'{device}' is not supported", "--device", "Use cpu or cuda")
    if found.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (found.index or 0) >= count:
            raise LeangridError(
                f"'{device}': torch {torch.__version__} sees {count} CUDA devices",
                "--device",
                "Use cpu, or a CUDA build",
            )
        capability = torch.cuda.get_device_capability(found)
        if capability < _CAPABILITY:
            name = f"{torch.cuda.get_device_name(found)} has compute capability {capability[0]}.{capability[1]}"
            raise LeangridError(
                f"{name}, and the kernels need {_CAPABILITY[0]}.{_CAPABILITY[1]}", "--device", "Use cpu"
            )
    return found


def set_threads(threads: int | None) -> None:
    """Set the number of CPU threads of torch; None leaves it as it is. RecipeError for less than 1."""
    if threads is None:
        return
    if threads < 1:
        raise RecipeError(f"{threads} threads", "--threads", "Use 1 or more, or leave it out for all")
    torch.set_num_threads(threads)


def has_own_memory(device: torch.device | str) -> bool:
    """Whether the device has memory of its own, so that work that does not fit there can be done on the CPU."""
    return torch.device(device).type != "cpu"


def usable_device_bytes(device: torch.device | str) -> int:
    """How many bytes of memory a run may use on ``device``: of its own memory, or of the machine's for the CPU."""
    if not has_own_memory(device):
        return int(_USABLE_HOST * memory.available_bytes())
    free, _ = torch.cuda.mem_get_info(device)
    return usable_part(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


def usable_part(free: int) -> int:
    """How many of ``free`` bytes of a CUDA device a run may use."""
    return int(_USABLE * free)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` means that a device, or the CPU allocator of torch, had not enough memory."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)
    )


def describe_gpu(device: torch.device | str) -> str | None:
    """Model, compute capability and CUDA version, which decide the bits of results; None for the CPU."""
    if not has_own_memory(device):
        return None
    found = torch.cuda.get_device_properties(device)
    return f"{found.name}, capability {found.major}.{found.minor}, CUDA {torch.version.cuda}"


def release_cached_memory(device: torch.device | str) -> None:
    """Give memory that torch's allocator keeps for reuse back to the device. Does nothing for the CPU."""
    if has_own_memory(device):
        torch.cuda.empty_cache()


def synchronize(device: torch.device | str) -> None:
    """Wait until the device has finished all work that was submitted to it. Does nothing for the CPU."""
    if has_own_memory(device):
        torch.cuda.synchronize(device)


def reset_peak_device_bytes(device: torch.device | str) -> None:
    """Let ``peak_device_bytes`` count from now on. Does nothing for the CPU."""
    if has_own_memory(device):
        torch.cuda.init()  # the allocator exists only after it
        torch.cuda.reset_peak_memory_stats(device)


def peak_device_bytes(device: torch.device | str) -> int:
    """The most bytes of tensors on ``device`` at one time since ``reset_peak_device_bytes``; 0 for the CPU."""
    return torch.cuda.max_memory_allocated(device) if has_own_memory(device) else 0


def copy_to_host(tensor: Tensor) -> Tensor:
    """A copy of ``tensor`` in pinned CPU memory, from which copies to a device can be asynchronous.

    A tensor on the CPU is returned itself."""
    if tensor.device.type == "cpu":
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)


class DeviceClock(Clock):
    """A clock whose stages include the work of the device: each waits until the device has finished."""

    def __init__(self, device: torch.device | str) -> None:
        super().__init__()
        self._device = torch.device(device)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """As ``Clock.stage``; the time ends when the device has finished its work."""
        with super().stage(name):
            try:
                yield
            finally:
                synchronize(self._device)

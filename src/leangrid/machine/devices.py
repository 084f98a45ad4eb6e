"""What is different on a device that is not the CPU: its own memory, which runs out; its own time, which must be waited
for."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from leangrid.errors import LeangridError, RecipeError
from leangrid.machine import memory
from leangrid.machine.stopwatch import Clock

# cuBLAS and cuSOLVER say in their own words that there was no memory for a handle or a workspace.
_NO_MEMORY = (
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
    "DefaultCPUAllocator",
)
# Of what is free: the rest goes to the allocator's holes, on a device also to the libraries' workspaces.
_USABLE, _USABLE_HOST = 0.94, 0.9


def checked(device: str) -> torch.device:
    """``device`` as torch knows it; LeangridError where it is none, or not on this machine."""
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
    return found


def use_threads(threads: int | None) -> None:
    """Let torch use so many CPU threads; its own choice where None. RecipeError for fewer than one."""
    if threads is None:
        return
    if threads < 1:
        raise RecipeError(f"{threads} threads", "--threads", "Use 1 or more, or leave it out for all")
    torch.set_num_threads(threads)


def accelerated(device: torch.device | str) -> bool:
    """True where the device has memory of its own, so that the CPU can step in for it."""
    return torch.device(device).type != "cpu"


def available_bytes(device: torch.device | str) -> int:
    """What a run may take on ``device``: of the device's own memory, or of the machine's."""
    if not accelerated(device):
        return int(_USABLE_HOST * memory.available_bytes())
    free, _ = torch.cuda.mem_get_info(device)
    return usable_bytes(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


def usable_bytes(free: int) -> int:
    """Of ``free`` bytes of an accelerator, what a run may take."""
    return int(_USABLE * free)


def out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that a device, or torch's CPU allocator, had no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)
    )


def release_cached(device: torch.device | str) -> None:
    """Give memory that torch keeps for later back to the device."""
    if accelerated(device):
        torch.cuda.empty_cache()


def wait(device: torch.device | str) -> None:
    """Until the device has done all that it was asked."""
    if accelerated(device):
        torch.cuda.synchronize(device)


def start_counting(device: torch.device | str) -> None:
    """From now on ``peak_bytes`` counts."""
    if accelerated(device):
        torch.cuda.init()  # before it, there is no allocator to ask
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device | str) -> int:
    """Most bytes of tensors on ``device`` at once since ``start_counting``; 0 for the CPU."""
    return torch.cuda.max_memory_allocated(device) if accelerated(device) else 0


def to_host(tensor: Tensor) -> Tensor:
    """A copy in host memory, pinned where that makes the way back asynchronous; the tensor itself where it is there
    already."""
    if tensor.device.type == "cpu":
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)


class DeviceClock(Clock):
    """A clock whose stages end when the device has done their work, not when it was asked to."""

    def __init__(self, device: torch.device | str) -> None:
        super().__init__()
        self._device = torch.device(device)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """As Clock.stage, on a device that is idle before and after."""
        with super().stage(name):
            try:
                yield
            finally:
                wait(self._device)

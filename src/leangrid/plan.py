"""What a run would cost, from headers alone: size, memory, disk, time, and what bounds it.

Each estimate is a sum that can be read off below; memory in footprint.py, and its parts are in the plan. None of them grows
with the number of blocks.
"""

import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from leangrid import kernels, work
from leangrid.clock import STAGES
from leangrid.devices import accelerated, available_bytes, checked, wait
from leangrid.errors import OutputError
from leangrid.footprint import Footprint, choose
from leangrid.models.gguf import DescribedCheckpoint, describe, is_gguf
from leangrid.models.skeleton import Skeleton
from leangrid.placement import Placement
from leangrid.precision import compute_dtype, products
from leangrid.prepare import refuse_impossible, settle
from leangrid.recipe import Recipe
from leangrid.sizes import LayerSize, disk_bytes, sizes, state_bytes
from leangrid.storage.hub import locate_source
from leangrid.storage.source import open_source

_F32 = 4
_MARGIN = 1.05
_HOLES = 1.1  # what the allocator keeps between live tensors
_REPLAYED = 2.6  # forward passes that replaying takes instead of one: up to each group, and once to the end
_CUDA_RUNTIME = 1 << 30  # host memory of the driver, cuBLAS and cuSOLVER
# Sweeps' worth of rows*cols^2 work: ours, min-max GPTQ's, two losses, and for each refit round about two more.
_SWEEPS, _SWEEPS_A_ROUND = 4.0, 3.0
# One thread with the native kernels.
_GRID_SECONDS_A_WEIGHT = {"affine": 1.5e-7, "offset": 2.0e-7, "superblock": 5.0e-7, "nonuniform": 3.5e-7}
_KERNEL_EFFICIENCY = 0.25  # share of the GEMM rate that sweeps and factorizations reach
_EXACT_EFFICIENCY = 0.125  # likewise LeanQuant-Exact: float64


@dataclass(frozen=True)
class Plan:
    """Estimates under the keys of ``quantize --json``; bytes and seconds."""

    source: str
    scheme: str
    format: str
    layers: int
    bits_per_weight: float
    bytes: int
    bytes_before: int
    peak_ram_bytes: int
    available_ram_bytes: int
    peak_gpu_bytes: int
    disk_bytes: int
    seconds: dict[str, float]
    kernels: dict[str, str]
    bound: str
    placement: dict[str, Any] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    layer_plans: list[LayerSize] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The promised keys; the layers as a list under ``layer_plans``; under ``memory`` the parts of every phase in bytes."""
        return asdict(self)


def plan(
    source: str | Path, recipe: Recipe | None = None, threads: int | None = None, device: str = "cpu", out: str | Path | None = None
) -> Plan:
    """Estimate ``quantize(source, out, recipe)`` without reading a weight.

    Raises:
        LeangridError: what ``quantize`` would refuse; OutputError where it cannot fit, with what would.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    checked(device)
    path = locate_source(str(source))
    skeleton = Skeleton(describe(path) if is_gguf(path) else open_source(path))
    settled = settle(recipe or Recipe.build(), skeleton, device)
    skeleton.compute_dtype = compute_dtype(settled.products, skeleton.dtype)
    refuse_impossible(settled, skeleton)
    sized, tokens = sizes(skeleton, settled), settled.samples * settled.length
    placement, memory = choose(skeleton, settled, settled.samples, settled.length, device)
    ram = _peak_ram(skeleton, settled, memory, device)
    seconds = _seconds(skeleton, settled, sized.layers, placement, device)
    available = psutil.virtual_memory().available
    result = Plan(
        source=str(source),
        scheme=settled.scheme,
        format=settled.format,
        layers=len(sized.layers),
        bits_per_weight=sized.bits_per_weight,
        bytes=sized.bytes_after,
        bytes_before=sized.bytes_before,
        peak_ram_bytes=ram,
        available_ram_bytes=available,
        peak_gpu_bytes=memory.peak if accelerated(device) else 0,
        disk_bytes=int(disk_bytes(skeleton, settled, tokens) * _MARGIN),
        seconds=seconds,
        kernels=dict.fromkeys(("grid", "solve"), kernels.backend(device)),
        bound="memory" if ram > available else "compute" if seconds["total"] > 2 * seconds["save"] else "disk",
        placement=placement.to_json(),
        memory={"peak_phase": memory.peak_phase, "phases": memory.phases, "host": memory.host},
        layer_plans=sized.layers,
    )
    _refuse_what_cannot_fit(result, settled, device, Path(out) if out is not None else Path.cwd())
    return result


def _streams(recipe: Recipe) -> int:
    return 2 if recipe.correct else 1


def _hidden(skeleton: Skeleton) -> int:
    return skeleton.base.get_input_embeddings().weight.shape[1]  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]


def _peak_ram(skeleton: Skeleton, recipe: Recipe, memory: Footprint, device: str) -> int:
    """This process now + what it will hold: everything on the CPU; beside a device what waits for it and the runtime's own."""
    here = psutil.Process().memory_info().rss
    parameters = sum(t.nbytes for t in skeleton.checkpoint.tensors.values()) // skeleton.dtype.itemsize
    sampling = _F32 * parameters if recipe.calibration == "self" else 0
    dequantizing = (_F32 + skeleton.dtype.itemsize) * parameters if isinstance(skeleton.checkpoint, DescribedCheckpoint) else 0
    held = memory.host_peak + _CUDA_RUNTIME if accelerated(device) else memory.peak
    return here + int(_HOLES * max(held, sampling, dequantizing))


def _seconds(skeleton: Skeleton, recipe: Recipe, layers: list[LayerSize], placement: Placement, device: str) -> dict[str, float]:
    with products(recipe.products):
        forward, fast = _gemm_rate(device, skeleton.compute_dtype), _gemm_rate(device)
    rate, streams, tokens = _gemm_rate(device), _streams(recipe), recipe.samples * recipe.length
    weights = sum(layer.rows * layer.cols for layer in layers)
    widths = {}
    for index in range(len(skeleton.blocks)):
        for group in skeleton.groups(index):
            first = f"{skeleton.block_name(index)}.{group[0]}"
            widths[first] = skeleton.shape(first)[1]
    sweeps = _SWEEPS + _SWEEPS_A_ROUND * (recipe.refine or 0)
    attention = len(skeleton.blocks) * 2 * tokens * recipe.length * _hidden(skeleton)
    threads = torch.get_num_threads()
    stages = dict.fromkeys(STAGES, 0.0)
    passes = _REPLAYED if placement.replay else 1
    stages["calibrate"] = passes * streams * (2 * weights * tokens / forward + attention / min(forward, rate))
    stages["hessian"] = sum(streams * 2 * tokens * cols**2 for cols in widths.values()) / fast
    stages["factor"] = sum((3 + 3 * (streams - 1)) * cols**3 for cols in widths.values()) / (rate * _KERNEL_EFFICIENCY)
    stages["solve"] = sum(sweeps * la.rows * la.cols**2 for la in layers) / (rate * _KERNEL_EFFICIENCY)
    if recipe.parsed.exact:
        stages["solve"] += sum(work.exact(la.rows, la.cols) for la in layers) / (rate * _EXACT_EFFICIENCY)
    stages["grid"] = weights * _GRID_SECONDS_A_WEIGHT[recipe.parsed.grid] / threads
    states = len(skeleton.blocks) * state_bytes(skeleton, recipe, tokens)
    stages["save"] = (2 * sum(la.bytes_after for la in layers) + states) / 5e8
    return {"total": round(sum(stages.values()), 1)} | {name: round(value, 2) for name, value in stages.items()}


def _gemm_rate(device: str, dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s of ``device`` in a quarter second of the product that dominates a run."""
    size = 8192 if accelerated(device) else 1024
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    _ = a @ b
    wait(device)
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < 0.25:
        _ = a @ b
        wait(device)
        count += 1
    return count * 2 * size**3 / (time.perf_counter() - begin)


def _refuse_what_cannot_fit(result: Plan, recipe: Recipe, device: str, out: Path) -> None:
    if result.peak_gpu_bytes and result.peak_gpu_bytes > (free := available_bytes(device)):
        raise OutputError(
            f"the run needs {result.peak_gpu_bytes / 2**30:.1f} GiB on {device} at its thriftiest, {free / 2**30:.1f} GiB can be used",
            result.source,
            "Free the device, or use --device cpu",
        )
    if result.peak_ram_bytes > result.available_ram_bytes:
        fewer = max(1, int(recipe.samples * result.available_ram_bytes / result.peak_ram_bytes / 1.2))
        raise OutputError(
            f"the run needs {result.peak_ram_bytes / 2**30:.1f} GiB of memory, {result.available_ram_bytes / 2**30:.1f} GiB are free",
            result.source,
            f"Try --samples {fewer}, or a machine with more memory",
        )
    existing = next(parent for parent in (out.absolute(), *out.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if result.disk_bytes > free:
        raise OutputError(
            f"the run needs {result.disk_bytes / 2**30:.2f} GiB of disk, {free / 2**30:.2f} GiB are free",
            existing,
            "Free some, or write elsewhere",
        )

"""What a run would cost, from headers alone: size, memory, disk, time, and what bounds it.

Memory is summed in footprint.py, time in cost.py, size and disk in sizes.py. Neither the model nor the device needs to
be here: a shape by name stands for a checkpoint, ``2x48GB`` for devices."""

import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from leangrid import kernels
from leangrid.errors import LeangridError, OutputError
from leangrid.machine import memory
from leangrid.machine.arithmetic import compute_dtype
from leangrid.machine.devices import accelerated, available_bytes, checked, use_threads
from leangrid.models.gguf import dequantizing_bytes, describe, is_gguf
from leangrid.models.naming import Weights
from leangrid.models.shapes import SHAPES
from leangrid.models.shapes import shape as shape_of
from leangrid.models.skeleton import Skeleton
from leangrid.planning.cost import Described, measured, seconds
from leangrid.planning.footprint import Demand, Footprint, choose, footprint
from leangrid.planning.settle import refuse_impossible, settle
from leangrid.planning.sizes import LayerSize, disk_bytes, sizes
from leangrid.recipe import Recipe
from leangrid.storage.hub import locate_stream
from leangrid.storage.source import open_source

_F32 = 4
_MARGIN = 1.05
_HOLES = 1.1  # what the allocator keeps between live tensors
_CUDA_RUNTIME = 1 << 30  # host memory of the driver, cuBLAS and cuSOLVER
_PROCESS = 600 << 20  # of Python, torch and transformers, before anything is read


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
    available_ram_bytes: int | None
    peak_gpu_bytes: int
    disk_bytes: int
    seconds: dict[str, float]
    kernels: dict[str, str]
    bound: str
    placement: dict[str, Any] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    layer_plans: list[LayerSize] = field(default_factory=list)
    samples: int = 0
    devices: int = 1
    rates: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The promised keys; the layers as a list under ``layer_plans``; under ``memory`` the parts of every phase in
        bytes and the host memory with hidden states in RAM and on disk; under ``rates`` what time was divided by, and
        whether it was assumed."""
        return asdict(self)


def plan(
    source: str | Path | None = None,
    recipe: Recipe | None = None,
    threads: int | None = None,
    device: str = "cpu",
    out: str | Path | None = None,
    *,
    shape: str | None = None,
) -> Plan:
    """Estimate ``quantize(source, out, recipe)`` without reading a weight.

    Args:
        shape: instead of a source, a known model's name or a config.json (models/shapes.py).
        device: as in ``quantize``, or devices that are not here, such as ``48GB`` or ``2x48GB@90TF`` (cost.Described).

    Raises:
        LeangridError: what ``quantize`` would refuse; OutputError where it cannot fit, with what would.
    """
    use_threads(threads)
    absent = Described.parse(device)
    skeleton = Skeleton(_opened(source, shape))
    result = _estimate(str(source or shape), skeleton, recipe or Recipe.build(), device, absent)
    if absent is None:
        _refuse_what_is_not_here(result, Path(out) if out is not None else Path.cwd())
    _refuse_small_device(result, device, absent.usable if absent else available_bytes(device))
    return result


def _estimate(source: str, skeleton: Skeleton, recipe: Recipe, device: str, absent: Described | None) -> Plan:
    """The plan of a run on ``device``, or on the devices that it describes."""
    kind = str(checked(device)) if absent is None else "cuda"
    settled = settle(recipe, skeleton, kind)
    skeleton.compute_dtype = compute_dtype(settled.products, skeleton.dtype)
    refuse_impossible(settled, skeleton)
    sized, tokens = sizes(skeleton, settled), settled.samples * settled.length
    ranks, budgets = (1, (None, None)) if absent is None else (absent.count, (absent.usable, 1 << 62))
    windows = -(-settled.samples // ranks)
    placement, held = choose(skeleton, settled, windows, settled.length, kind, *budgets)
    on_disk = footprint(
        Demand.of(skeleton, settled, windows, settled.length, kind),
        replace(placement, host_streams=True, disk_streams=True),
    )
    here = _PROCESS if absent else memory.resident_bytes()
    ram, thrifty = (ranks * (here + _peak_ram(skeleton, settled, one, kind)) for one in (held, on_disk))
    rates = measured(skeleton, settled, kind) if absent is None else absent.rates(settled)
    times = seconds(skeleton, settled, sized.layers, placement, rates)
    available = None if absent else here + memory.available_bytes()  # both of the whole process
    return Plan(
        source=source,
        samples=settled.samples,
        scheme=settled.scheme,
        format=settled.format,
        layers=len(sized.layers),
        bits_per_weight=sized.bits_per_weight,
        bytes=sized.bytes_after,
        bytes_before=sized.bytes_before,
        peak_ram_bytes=ram,
        available_ram_bytes=available,
        peak_gpu_bytes=held.peak if accelerated(kind) else 0,
        disk_bytes=int(sum(disk_bytes(skeleton, settled, tokens, placement.disk_streams)) * _MARGIN),
        seconds=times,
        kernels=dict.fromkeys(("grid", "solve"), "triton" if absent else kernels.backend(kind)),
        bound="memory"
        if available is not None and ram > available
        else "compute"
        if times["total"] > 2 * times["save"]
        else "disk",
        placement=placement.to_json(),
        memory={
            "peak_phase": held.peak_phase,
            "phases": held.phases,
            "host": held.host,
            "ram_with_states_on_disk": thrifty,
        },
        layer_plans=sized.layers,
        devices=ranks,
        rates=rates.to_json(),
    )


def _opened(source: str | Path | None, named: str | None) -> Weights:
    """The headers of a source, or the description of a shape."""
    if (source is None) == (named is None):
        raise LeangridError(
            "plan takes a SOURCE or a --shape, one of them", "SOURCE", f"Known shapes: {', '.join(SHAPES)}"
        )
    if named is not None:
        return shape_of(named)
    path, remote = locate_stream(str(source))
    return describe(path) if is_gguf(path) else open_source(path, remote=remote)


def _peak_ram(skeleton: Skeleton, recipe: Recipe, held: Footprint, device: str) -> int:
    """What the process will hold besides itself: everything on the CPU; beside a device what waits for it and the
    runtime's own."""
    parameters = sum(t.nbytes for t in skeleton.checkpoint.tensors.values()) // skeleton.dtype.itemsize
    sampling = _F32 * parameters if recipe.calibration == "self" else 0
    counts = (t.nbytes // skeleton.dtype.itemsize for t in skeleton.checkpoint.tensors.values())
    dequantizing = dequantizing_bytes(counts) if is_gguf(skeleton.checkpoint.directory) else 0
    needed = held.host_peak + _CUDA_RUNTIME if accelerated(device) else held.peak
    return int(_HOLES * max(needed, sampling, dequantizing))


def _refuse_small_device(result: Plan, device: str, free: int) -> None:
    if result.peak_gpu_bytes > free:
        raise OutputError(
            f"the run needs {result.peak_gpu_bytes / 2**30:.1f} GiB on {device} at its thriftiest, {free / 2**30:.1f} GiB can be used",
            result.source,
            "Describe a larger one" if result.rates["assumed"] else "Free the device, or use --device cpu",
        )


def _refuse_what_is_not_here(result: Plan, out: Path) -> None:
    if result.available_ram_bytes is not None and result.peak_ram_bytes > result.available_ram_bytes:
        fewer = max(1, int(result.samples * result.available_ram_bytes / result.peak_ram_bytes / 1.2))
        raise OutputError(
            f"the run needs {result.peak_ram_bytes / 2**30:.1f} GiB of memory, {result.available_ram_bytes / 2**30:.1f} GiB can be had",
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

"""What a run would cost, from headers alone: size, memory, disk, time, and what bounds it.

Memory is added up in footprint.py, time in cost.py, size and disk in sizes.py. Neither the model's weights nor the
device has to be on this machine: the name of a known shape describes a checkpoint, ``2x48GB`` describes devices."""

import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from leangrid import kernels
from leangrid.errors import LeangridError, OutputError
from leangrid.machine import memory
from leangrid.machine.arithmetic import choose_compute_dtype
from leangrid.machine.devices import has_own_memory, parse_device, set_threads, usable_device_bytes
from leangrid.models.gguf import dequantizing_bytes, describe, is_gguf
from leangrid.models.naming import Weights
from leangrid.models.shapes import SHAPES, describe_shape
from leangrid.models.skeleton import Skeleton
from leangrid.planning.budget import Budget
from leangrid.planning.cost import Described, estimate_seconds, measure_rates
from leangrid.planning.demand import Demand
from leangrid.planning.footprint import Footprint, choose_placement, sum_footprint
from leangrid.planning.readers import opened_in
from leangrid.planning.resolve import refuse_impossible, resolve_recipe
from leangrid.planning.sizes import LayerSize, compute_sizes, disk_bytes
from leangrid.planning.structure import describe_kept, describe_source, describe_structure
from leangrid.recipe import Recipe
from leangrid.results import Result
from leangrid.storage.hub import locate_stream
from leangrid.storage.source import open_source

_F32 = 4  # bytes
_DISK_MARGIN = 1.05
_FRAGMENTATION = 1.1  # memory that the allocator holds, over the bytes of live tensors
_CUDA_RUNTIME = 1 << 30  # host memory of the driver, cuBLAS and cuSOLVER
_PROCESS = 600 << 20  # host memory of Python, torch and transformers, before anything is read


@dataclass(frozen=True)
class Plan(Result):
    """What a run would come to: estimates under the keys of ``quantize --json``; sizes in bytes, times in seconds.

    Attributes:
        source: the source, or the name of the shape.
        scheme, format: what ``auto`` stands for in the recipe, written out.
        layers: how many linears would be quantized.
        bits_per_weight: of the quantized linears, codes and grids.
        bytes, bytes_before: size of all weights, of the result and of the source.
        peak_ram_bytes: host memory of the process, or of all processes of several devices together.
        available_ram_bytes: host memory that the process can have here; None for devices that are not here.
        peak_gpu_bytes: memory of one device; 0 on the CPU.
        disk_bytes: free disk space that the run needs, the result included.
        seconds: time by stage, and ``total``.
        kernels: which implementation would run, by kernel.
        bound: what limits the run: ``memory``, ``compute`` or ``disk``.
        placement: what would lie in memory of the device, of the host and on disk (planning/placement.py).
        memory: bytes of each phase of the run by what they hold, the phase with the peak, and
            ``ram_with_states_on_disk``: host memory if the hidden states lay on disk.
        layer_plans: one entry for each linear: name, shape, scheme, bytes before and after.
        samples, length: calibration windows, and tokens of each.
        calibration: where they would come from, with what an effort adds.
        devices: how many processes, one for each device.
        rates: the speeds that the times were divided by, and under ``assumed`` whether they were assumed instead of
            measured here.
        opened_in: reader -> "yes", or "no: " and why it would not open the result.
        structure: the blocks that were found, their kinds and groups of linears, and what flows between them.
        kept: what stays as it is stored: names with ``*`` for numbers, why, and how many.
        stored_as: what a source in fewer bits than 16 is stored in; None for others. Its ``bytes_before`` are those of
            the dequantized weights.
        budget: ``bits`` or ``size`` as asked for, the candidate schemes, how many units of linears choose among them,
            and the range ``bits_from`` to ``bits_to``; empty without one. The run chooses from data: schemes and sizes
            here are those of an even choice within the budget.

    Example:
        >>> planned = leangrid.plan("model", leangrid.Recipe(scheme="NU4", samples=16, length=64))
        >>> planned.layer_plans[0].name, planned.bytes < planned.bytes_before
        ('model.layers.0.self_attn.q_proj', True)
    """

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
    length: int = 0
    calibration: str = ""
    devices: int = 1
    rates: dict[str, Any] = field(default_factory=dict)
    opened_in: dict[str, str] = field(default_factory=dict)
    structure: dict[str, Any] = field(default_factory=dict)
    kept: list[dict[str, Any]] = field(default_factory=list)
    stored_as: dict[str, Any] | None = None
    budget: dict[str, Any] = field(default_factory=dict)


def plan(
    source: str | Path | None = None,
    recipe: Recipe | None = None,
    threads: int | None = None,
    device: str = "cpu",
    out: str | Path | None = None,
    *,
    shape: str | None = None,
) -> Plan:
    """Estimate what ``quantize(source, out, recipe)`` would cost, without reading a weight. Nothing is written.

    Args:
        source: as in ``quantize``; None where ``shape`` is given.
        recipe: as in ``quantize``; None: the defaults.
        threads: CPU threads; None: torch's own choice.
        device: as in ``quantize``, or devices that are not here: ``48GB`` or ``2x48GB@90TF`` (how many, memory of
            each, and TFLOP/s where they are known), ``h200`` or ``2xl40s`` (planning/cards.py).
        out: where the result would be written, whose free disk space is looked at; None: the working directory.
        shape: instead of a source the name of a known model, or the path of a config.json (models/shapes.py).

    Returns:
        The estimates.

    Raises:
        OutputError: memory or disk space do not suffice; it says what would fit. LeangridError: whatever ``quantize``
            would refuse.

    Example:
        >>> planned = leangrid.plan("model", leangrid.Recipe(scheme="NU4", samples=16, length=64))
        >>> planned.layers, planned.scheme, planned.peak_gpu_bytes
        (14, 'NU4', 0)
    """
    set_threads(threads)
    absent = Described.parse(device)
    with memory.without_garbage_collection():
        skeleton = Skeleton(open_planned(source, shape))
        result = estimate(str(source or shape), skeleton, recipe or Recipe(), device, absent)
    if absent is None:
        _refuse_what_is_not_here(result, Path(out) if out is not None else Path.cwd())
    _refuse_small_device(result, device, absent.usable if absent else usable_device_bytes(device))
    return result


def estimate(source: str, skeleton: Skeleton, recipe: Recipe, device: str, absent: Described | None) -> Plan:
    """The plan of a run on ``device``, or on the devices that it describes (``absent``), whether it fits or not."""
    kind = str(parse_device(device)) if absent is None else "cuda"
    skeleton.select(recipe.ignore, recipe.only)
    resolved = resolve_recipe(recipe, skeleton, kind)
    skeleton.compute_dtype = choose_compute_dtype(resolved.products, skeleton.dtype)
    refuse_impossible(resolved, skeleton)
    budget = Budget.of(skeleton, resolved) if resolved.has_budget else None
    resolved = resolved if budget is None else budget.spread()
    sized, tokens = compute_sizes(skeleton, resolved), resolved.samples * resolved.length
    ranks, budgets = (1, (None, None)) if absent is None else (absent.count, (absent.usable, 1 << 62))
    windows = -(-resolved.samples // ranks)
    placement, held = choose_placement(skeleton, resolved, windows, resolved.length, kind, *budgets)
    on_disk = sum_footprint(
        Demand.of(skeleton, resolved, windows, resolved.length, kind),
        replace(placement, host_streams=True, disk_streams=True),
    )
    here = _PROCESS if absent else memory.resident_bytes()
    ram, ram_on_disk = (ranks * (here + _peak_ram(skeleton, resolved, one, kind)) for one in (held, on_disk))
    rates = measure_rates(skeleton, resolved, kind) if absent is None else absent.rates(resolved)
    times = estimate_seconds(skeleton, resolved, sized.layers, placement, rates, budget)
    available = None if absent else here + memory.available_bytes()  # both of the whole process
    return Plan(
        source=source,
        samples=resolved.samples,
        length=resolved.length,
        calibration=resolved.calibration,
        scheme=resolved.scheme,
        format=resolved.format,
        layers=len(sized.layers),
        bits_per_weight=sized.bits_per_weight,
        bytes=sized.bytes_after,
        bytes_before=sized.bytes_before,
        peak_ram_bytes=ram,
        available_ram_bytes=available,
        peak_gpu_bytes=held.peak if has_own_memory(kind) else 0,
        disk_bytes=int(sum(disk_bytes(skeleton, resolved, tokens, placement.disk_streams, sized)) * _DISK_MARGIN),
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
            "ram_with_states_on_disk": ram_on_disk,
        },
        layer_plans=sized.layers,
        devices=ranks,
        rates=rates.to_json(),
        opened_in=opened_in(skeleton, resolved),
        structure=describe_structure(skeleton),
        kept=describe_kept(skeleton),
        stored_as=describe_source(skeleton),
        budget={} if budget is None else budget.to_json(),
    )


def open_planned(source: str | Path | None, named: str | None) -> Weights:
    """The headers of a source, or the description of a shape."""
    if (source is None) == (named is None):
        raise LeangridError(
            "plan takes a SOURCE or a --shape, one of them", "SOURCE", f"Known shapes: {', '.join(SHAPES)}"
        )
    if named is not None:
        return describe_shape(named)
    path, remote = locate_stream(str(source))
    return describe(path) if is_gguf(path) else open_source(path, remote=remote)


def _peak_ram(skeleton: Skeleton, recipe: Recipe, held: Footprint, device: str) -> int:
    """Host bytes that the run adds to the process: everything on the CPU; beside a device what is moved to it later,
    and the runtime of the device."""
    parameters = sum(t.nbytes for t in skeleton.checkpoint.tensors.values()) // skeleton.dtype.itemsize
    sampling = _F32 * parameters if recipe.samples_itself else 0
    counts = (t.nbytes // skeleton.dtype.itemsize for t in skeleton.checkpoint.tensors.values())
    dequantizing = dequantizing_bytes(counts) if is_gguf(skeleton.checkpoint.directory) else 0
    needed = held.host_peak + _CUDA_RUNTIME if has_own_memory(device) else held.peak
    return int(_FRAGMENTATION * max(needed, sampling, dequantizing))


def _refuse_small_device(result: Plan, device: str, free: int) -> None:
    if result.peak_gpu_bytes > free:
        needed, usable = result.peak_gpu_bytes / 2**30, free / 2**30
        way_out = "Describe a larger one" if result.rates["assumed"] else "Free the device, or use --device cpu"
        raise OutputError(
            f"the run needs {needed:.1f} GiB on {device} at the least, {usable:.1f} GiB can be used",
            result.source,
            _way_out(result, way_out),
        )


def _way_out(result: Plan, otherwise: str) -> str:
    """What to do about too little memory: finishing and the guide hold the whole model, everything else one block."""
    return {"finish": "Use --finish 0", "draw": "Use --guide 0"}.get(result.memory["peak_phase"], otherwise)


def _refuse_what_is_not_here(result: Plan, out: Path) -> None:
    if result.available_ram_bytes is not None and result.peak_ram_bytes > result.available_ram_bytes:
        fewer = max(1, int(result.samples * result.available_ram_bytes / result.peak_ram_bytes / 1.2))
        needed, available = result.peak_ram_bytes / 2**30, result.available_ram_bytes / 2**30
        raise OutputError(
            f"the run needs {needed:.1f} GiB of memory, {available:.1f} GiB can be had",
            result.source,
            _way_out(result, f"Try --samples {fewer}, or a machine with more memory"),
        )
    existing = next(parent for parent in (out.absolute(), *out.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if result.disk_bytes > free:
        raise OutputError(
            f"the run needs {result.disk_bytes / 2**30:.2f} GiB of disk, {free / 2**30:.2f} GiB are free",
            existing,
            "Free some, or write elsewhere",
        )

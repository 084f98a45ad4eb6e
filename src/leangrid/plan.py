"""What a run would cost, from headers alone: size, memory, disk, time, and what bounds it.

Each estimate is a sum that can be read off below. Memory follows the walk: the block's weights, the hidden states of both
streams, one group's inputs, and the Hessian with its factor; none of them grows with the number of blocks.
"""

import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from leangrid import kernels
from leangrid.clock import STAGES
from leangrid.errors import OutputError
from leangrid.models.gguf import describe, is_gguf
from leangrid.models.skeleton import Skeleton
from leangrid.precision import products
from leangrid.prepare import refuse_impossible, settle
from leangrid.recipe import Recipe
from leangrid.sizes import LayerSize, disk_bytes, sizes, state_bytes
from leangrid.storage.hub import locate_source
from leangrid.storage.source import open_source

_F32 = 4
_MARGIN = 1.05
_HOLES = 1.2  # what the allocator keeps between live tensors
# Sweeps' worth of rows*cols^2 work: ours, min-max GPTQ's, two losses, and for each refit round about two more.
_SWEEPS, _SWEEPS_A_ROUND = 4.0, 3.0
_GRID_SECONDS_A_WEIGHT = {"affine": 1.5e-7, "nonuniform": 3.5e-7}  # one thread with the native kernels
_KERNEL_EFFICIENCY = 0.25  # share of the GEMM rate that sweeps and factorizations reach


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
    layer_plans: list[LayerSize] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The promised keys; the layers as a list under ``layer_plans``."""
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
    path = locate_source(str(source))
    skeleton = Skeleton(describe(path) if is_gguf(path) else open_source(path))
    settled = settle(recipe or Recipe.build(), skeleton, device)
    refuse_impossible(settled, skeleton)
    sized, tokens = sizes(skeleton, settled), settled.samples * settled.length
    ram = _peak_ram(skeleton, settled, sized.layers)
    seconds = _seconds(skeleton, settled, sized.layers)
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
        peak_gpu_bytes=0 if device == "cpu" else ram,
        disk_bytes=int(disk_bytes(skeleton, settled, tokens) * _MARGIN),
        seconds=seconds,
        kernels={"grid": kernels.backend(), "solve": kernels.backend()},
        bound="memory" if ram > available else "compute" if seconds["total"] > 2 * seconds["save"] else "disk",
        layer_plans=sized.layers,
    )
    _refuse_what_cannot_fit(result, settled, Path(out) if out is not None else Path.cwd())
    return result


def _streams(recipe: Recipe) -> int:
    return 2 if recipe.correct else 1


def _hidden(skeleton: Skeleton) -> int:
    return skeleton.base.get_input_embeddings().weight.shape[1]  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]


def _peak_ram(skeleton: Skeleton, recipe: Recipe, layers: list[LayerSize]) -> int:
    """This process now + the larger of the two phases: embedding the windows, or walking the largest block."""
    here = psutil.Process().memory_info().rss
    per_block = len(skeleton.linear_names(0))
    largest = max(sum(la.rows * la.cols for la in layers[i : i + per_block]) for i in range(0, len(layers), per_block))
    widest = max(layer.cols for layer in layers)
    tallest = max(layer.rows * layer.cols for layer in layers)
    hidden, tokens = _hidden(skeleton), recipe.samples * recipe.length
    rows = skeleton.base.get_input_embeddings().weight.shape[0]  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    states = state_bytes(skeleton, recipe, recipe.samples * recipe.length)
    # A paused pass holds the residual, what its attention or MLP computed on the way, and the group's input.
    paused = _streams(recipe) * tokens * _F32 * 2 * (hidden + widest)
    algebra = _F32 * (10 * widest**2 + 8 * tallest)
    walking = states + paused + 2 * largest * _F32 + algebra
    embedding = states + rows * hidden * (_F32 + skeleton.dtype.itemsize)
    sampling = sum(t.nbytes for t in skeleton.checkpoint.tensors.values()) * 2 if recipe.calibration == "self" else 0
    return here + int(_HOLES * max(walking, embedding, sampling))


def _seconds(skeleton: Skeleton, recipe: Recipe, layers: list[LayerSize]) -> dict[str, float]:
    with products(recipe.products):
        fast = _gemm_rate()
    rate, streams, tokens = _gemm_rate(), _streams(recipe), recipe.samples * recipe.length
    weights = sum(layer.rows * layer.cols for layer in layers)
    widths = {}
    for index in range(len(skeleton.blocks)):
        for group in skeleton.architecture.groups:
            first = f"{skeleton.block_name(index)}.{group[0]}"
            widths[first] = skeleton.shape(first)[1]
    sweeps = _SWEEPS + _SWEEPS_A_ROUND * (recipe.refine or 0)
    attention = len(skeleton.blocks) * 2 * tokens * recipe.length * _hidden(skeleton)
    threads = torch.get_num_threads()
    stages = dict.fromkeys(STAGES, 0.0)
    stages["calibrate"] = streams * (2 * weights * tokens / fast + attention / rate)
    stages["hessian"] = sum(streams * 2 * tokens * cols**2 for cols in widths.values()) / fast
    stages["factor"] = sum((3 + 3 * (streams - 1)) * cols**3 for cols in widths.values()) / (rate * _KERNEL_EFFICIENCY)
    stages["solve"] = sum(sweeps * la.rows * la.cols**2 for la in layers) / (rate * _KERNEL_EFFICIENCY)
    stages["grid"] = weights * _GRID_SECONDS_A_WEIGHT[recipe.parsed.grid] / threads
    states = len(skeleton.blocks) * state_bytes(skeleton, recipe, tokens)
    stages["save"] = (2 * sum(la.bytes_after for la in layers) + states) / 5e8
    return {"total": round(sum(stages.values()), 1)} | {name: round(value, 2) for name, value in stages.items()}


def _gemm_rate() -> float:
    """Float32 multiply-adds of this machine, in FLOP/s: a quarter second of the product that dominates a run."""
    a, b = torch.ones(1024, 1024), torch.ones(1024, 1024)
    _ = a @ b
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < 0.25:
        _ = a @ b
        count += 1
    return count * 2 * 1024**3 / (time.perf_counter() - begin)


def _refuse_what_cannot_fit(result: Plan, recipe: Recipe, out: Path) -> None:
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

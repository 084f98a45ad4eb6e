"""The model of cost: seconds of each stage from operations and rates. docs/performance.md has the formulas and how near they come.

Operations are counts of shapes; rates are measured where the device is here, and stated where it is only described.
"""

import re
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from leangrid import work
from leangrid.clock import STAGES
from leangrid.devices import accelerated, usable_bytes, wait
from leangrid.errors import LeangridError
from leangrid.models.skeleton import Skeleton
from leangrid.placement import Placement
from leangrid.precision import products
from leangrid.recipe import Recipe
from leangrid.sizes import LayerSize, hidden_size, state_bytes

_REPLAYED = 2.6  # forward passes that replaying takes instead of one: up to each group, and once to the end
# Sweeps' worth of rows*cols^2 work: ours, min-max GPTQ's, two losses, and for each refit round about two more.
_SWEEPS, _SWEEPS_A_ROUND = 4.0, 3.0
# One thread with the native kernels.
_GRID_SECONDS_A_WEIGHT = {"affine": 1.5e-7, "offset": 2.0e-7, "superblock": 5.0e-7, "nonuniform": 3.5e-7}
_KERNEL_EFFICIENCY = 0.25  # share of the GEMM rate that sweeps and factorizations reach
_EXACT_EFFICIENCY = 0.125  # likewise LeanQuant-Exact: float64
_DISK = 5e8  # bytes/s that a commit reaches: written, hashed, synced
_F32 = 4

# Of a device that is only described. Products on 16-bit and TF32 units relative to float32: the ratios of NVIDIA's 48 GB cards
# (RTX A6000 38.7, 77, 155 TFLOP/s; L40S 91.6, 183, 362: their data sheets, dense); larger ratios on A100 and H100.
_STATED_TFLOPS, _TF32, _HALF = 30.0, 2.0, 4.0
_ATTAINED = 0.7  # share of a data sheet's rate that a large product reaches
_THREAD = 1e11  # float32 FLOP/s of the CPU thread behind the grids' seconds
_LINK = 2e10  # bytes/s between ranks: PCIe 4, 16 lanes
_DESCRIBED = re.compile(r"(?:(?P<count>[1-9]\d{0,3})x)?(?P<memory>\d{1,5}(?:\.\d+)?)gi?b(?:@(?P<rate>\d{1,6}(?:\.\d+)?)tf)?", re.IGNORECASE)


@dataclass(frozen=True)
class Rates:
    """What the sums divide by.

    Attributes:
        forward, sums, algebra: FLOP/s of large products in forward passes, in the Hessians' sums, in float32.
        threads: CPU threads' worth of speed at the grids.
        disk: bytes/s of commits. link: bytes/s between ranks. ranks: how many share the work.
        assumed: whether they are stated, not measured.
    """

    forward: float
    sums: float
    algebra: float
    threads: float
    disk: float = _DISK
    link: float = _LINK
    ranks: int = 1
    assumed: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Described:
    """``count`` accelerators that are not here, each of ``memory`` bytes and ``flops`` float32 FLOP/s by its data sheet."""

    count: int
    memory: int
    flops: float

    @classmethod
    def parse(cls, text: str) -> "Described | None":
        """``2x48GB`` or ``80GB@67TF``; None where ``text`` names a device in torch's way. LeangridError for anything between.

        A GB is 2^30 bytes, as makers of cards count.
        """
        match = _DESCRIBED.fullmatch(text.strip())
        if match is None:
            if text[:1].isdigit():
                raise LeangridError(
                    f"'{text}' describes no device", "--device", "Use 48GB, 2x48GB or 2x48GB@90TF: count, memory, float32 rate"
                )
            return None
        memory, rate = float(match["memory"]), float(match["rate"] or _STATED_TFLOPS)
        if not memory or not rate:
            raise LeangridError(f"'{text}' describes a device without memory or speed", "--device", "Use 48GB, 2x48GB or 2x48GB@90TF")
        return cls(int(match["count"] or 1), int(memory * 2**30), rate * 1e12)

    @property
    def usable(self) -> int:
        """Bytes of one that a run may take."""
        return usable_bytes(self.memory)

    def rates(self, recipe: Recipe) -> Rates:
        """What is assumed of them."""
        half, attained = recipe.products == "bfloat16", _ATTAINED * self.flops
        fast = _TF32 * attained if recipe.products != "float32" else attained
        return Rates(_HALF * attained if half else fast, fast, attained, attained * _KERNEL_EFFICIENCY / _THREAD,
                     ranks=self.count, assumed=True)  # fmt: skip


def measured(skeleton: Skeleton, recipe: Recipe, device: str) -> Rates:
    """Of a device that is here, in less than a second."""
    with products(recipe.products):
        forward, sums = _gemm_rate(device, skeleton.compute_dtype), _gemm_rate(device)
    algebra = _gemm_rate(device)
    threads = algebra * _KERNEL_EFFICIENCY / _THREAD if accelerated(device) else float(torch.get_num_threads())
    return Rates(forward, sums, algebra, threads)


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


def seconds(skeleton: Skeleton, recipe: Recipe, layers: list[LayerSize], placement: Placement, rates: Rates) -> dict[str, float]:
    """Estimated seconds by stage, and ``total``; with several ranks also ``exchange``."""
    streams, tokens, blocks = 2 if recipe.correct else 1, recipe.samples * recipe.length, len(skeleton.blocks)
    weights = sum(layer.rows * layer.cols for layer in layers)
    firsts = (f"{skeleton.block_name(i)}.{group[0]}" for i in range(blocks) for group in skeleton.architecture.groups)
    widths = [skeleton.shape(name)[1] for name in firsts]
    sweeps = _SWEEPS + _SWEEPS_A_ROUND * (recipe.refine or 0)
    attention = blocks * 2 * tokens * recipe.length * hidden_size(skeleton)
    algebra, states = rates.algebra * _KERNEL_EFFICIENCY, state_bytes(skeleton, recipe, tokens)
    stages = dict.fromkeys(STAGES, 0.0)
    passes = _REPLAYED if placement.replay else 1
    if placement.disk_streams:  # read for each group and for the way out
        stages["load"] = (len(skeleton.architecture.groups) + 1) * blocks * states / rates.disk
    stages["calibrate"] = passes * streams * (2 * weights * tokens / rates.forward + attention / min(rates.forward, rates.algebra))
    stages["hessian"] = sum(streams * 2 * tokens * cols**2 for cols in widths) / rates.sums
    stages["solve"] = sum(sweeps * la.rows * la.cols**2 for la in layers) / algebra
    if recipe.parsed.exact:
        stages["solve"] += sum(work.exact(la.rows, la.cols) for la in layers) / (rates.algebra * _EXACT_EFFICIENCY)
    stages["grid"] = weights * _GRID_SECONDS_A_WEIGHT[recipe.parsed.grid] / rates.threads
    shared = {name: stages[name] / rates.ranks for name in ("calibrate", "hessian", "solve", "grid")}
    # The factor is not shared: every rank needs it whole. What was written above is.
    alone = {
        "factor": sum((3 + 3 * (streams - 1)) * cols**3 for cols in widths) / algebra,
        "save": (2 * sum(la.bytes_after for la in layers) + (1 + placement.disk_streams) * blocks * states) / rates.disk,
    }
    if rates.ranks > 1:  # a ring: H and G added up, new weights given to all
        moved = sum(streams * _F32 * cols**2 for cols in widths) * 2 + sum(layer.bytes_before for layer in layers)
        alone["exchange"] = moved * (rates.ranks - 1) / rates.ranks / rates.link
    stages |= shared | alone
    return {"total": round(sum(stages.values()), 1)} | {name: round(value, 2) for name, value in stages.items()}

"""The model of cost: seconds of each stage from operations and rates. docs/performance.md has the formulas and how near
they come.

Operations are counts of shapes; rates are measured where the device is here, and stated where it is only described.
"""

import re
import time
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import torch

from leangrid.errors import LeangridError
from leangrid.grids import grid_class
from leangrid.machine import flops
from leangrid.machine.arithmetic import use_products
from leangrid.machine.devices import has_own_memory, synchronize, usable_part
from leangrid.machine.stopwatch import STAGES
from leangrid.models.flow import flows_live
from leangrid.models.skeleton import Skeleton
from leangrid.planning.budget import EXPERTS, PROBED_LENGTH, Budget, count_measured, count_probed
from leangrid.planning.cards import CARDS
from leangrid.planning.gradients import finishes_by_blocks
from leangrid.planning.groups import Group, groups_of
from leangrid.planning.placement import Placement
from leangrid.planning.sizes import LayerSize, state_bytes
from leangrid.recipe import Recipe
from leangrid.solve.trial import ROWS
from leangrid.solve.tuning import count_held_out, count_step_windows
from leangrid.storage import state_schedule

_REPLAYED = 2.6  # forward passes that replaying takes instead of one: up to each group, and once to the end
# Shares of a large product's rate that the stages reach (the same benchmark): sweeps in blocks with their descents, the
# baseline's sweep and losses, factorizations, the correction's products, forward passes; LeanQuant-Exact in float64.
_SOLVE, _BASELINE, _FACTOR, _CORRECT, _FORWARD, _EXACT = 0.4, 0.6, 0.36, 0.8, 0.7, 0.125
# The same where the model writes its own text, one token of 48 windows at once (SmolLM2, one run: docs/log.md).
_WRITE = 0.45
_SUMS_PANEL = 512  # columns of the squares in which Hessians are summed
_DISK, _READ = 5e8, 2e9  # bytes/s that a commit reaches: written, hashed, synced; and that reading reaches
_F32 = 4
# Tuning: forward passes that a pass and its gradient take, of a whole model also the original's; and seconds that
# rounding a weight, its gradient and its step take on one CPU thread: a guess of some fifteen passes over memory, not
# measured.
_BACKWARD, _ORIGINAL, _TUNED_SECONDS = 3, 1, 1.5e-8

# Of a device that is only described by its memory. Products on 16-bit and TF32 units relative to float32: the ratios of
# NVIDIA's 48 GB cards (RTX A6000 38.7, 77, 155 TFLOP/s; L40S 91.6, 183, 362: their data sheets, dense); those of others
# differ (cards.py).
_STATED_TFLOPS, _TF32, _HALF = 30.0, 2.0, 4.0
_ATTAINED = 0.7  # share of a data sheet's rate that a large product reaches
_THREAD, _GRID_SHARE = (
    1e11,
    0.25,
)  # float32 FLOP/s of the CPU thread behind the grids' seconds; what a GPU makes of its own there
_LINK = 2.4e9  # bytes/s between ranks: gloo between two processes of one host (docs/log.md)
_DESCRIBED = re.compile(
    r"(?:(?P<count>[1-9]\d{0,3})x)?(?P<memory>\d{1,5}(?:\.\d+)?)gi?b(?:@(?P<rate>\d{1,6}(?:\.\d+)?)tf)?", re.IGNORECASE
)
_NAMED = re.compile(r"(?:(?P<count>[1-9]\d{0,3})x)?(?P<name>[a-z]\w*)", re.IGNORECASE)


@dataclass(frozen=True)
class Rates:
    """What the sums divide by.

    Attributes:
        forward, sums, algebra: FLOP/s of large products in forward passes, in the Hessians' sums, in float32.
        threads: CPU threads' worth of speed at the grids.
        disk, read: bytes/s of commits and of reading. link: bytes/s between ranks. ranks: how many share the work.
        assumed: whether they are stated, not measured.
        halves: whether a triangle is inverted by halves: on a CPU.
    """

    forward: float
    sums: float
    algebra: float
    threads: float
    disk: float = _DISK
    read: float = _READ
    link: float = _LINK
    ranks: int = 1
    assumed: bool = False
    halves: bool = True

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Described:
    """``count`` accelerators that are not here, each of ``memory`` bytes, and of so many FLOP/s in float32 (``flops``),
    TensorFloat-32 and bfloat16 products by its data sheet."""

    count: int
    memory: int
    flops: float
    tf32: float
    half: float

    @classmethod
    def parse(cls, text: str) -> "Described | None":
        """``2x48GB``, ``80GB@67TF``, ``h200`` or ``2xl40s``; None where ``text`` names a device in torch's way.
        LeangridError for anything between.

        A GB is 2^30 bytes, as makers of cards count.
        """
        match, named = _DESCRIBED.fullmatch(text.strip()), _NAMED.fullmatch(text.strip())
        if named is not None and (card := CARDS.get(named["name"].lower())) is not None:
            rates = (1e12 * rate for rate in (card.float32, card.tf32, card.half))
            return cls(int(named["count"] or 1), int(card.memory * 2**30), *rates)
        ways = f"Use 48GB, 2x48GB or 2x48GB@90TF (count, memory, float32 rate), or {', '.join(CARDS)}"
        if match is None:
            if text[:1].isdigit():
                raise LeangridError(f"'{text}' describes no device", "--device", ways)
            return None
        memory, rate = float(match["memory"]), 1e12 * float(match["rate"] or _STATED_TFLOPS)
        if not memory or not rate:
            raise LeangridError(f"'{text}' describes a device without memory or speed", "--device", ways)
        return cls(int(match["count"] or 1), int(memory * 2**30), rate, _TF32 * rate, _HALF * rate)

    @property
    def usable(self) -> int:
        """Bytes of one that a run may take."""
        return usable_part(self.memory)

    def rates(self, recipe: Recipe) -> Rates:
        """What is assumed of them."""
        algebra, tf32, half = (_ATTAINED * rate for rate in (self.flops, self.tf32, self.half))
        sums = algebra if recipe.products == "float32" else tf32
        forward = half if recipe.products == "bfloat16" else sums
        threads = algebra * _GRID_SHARE / _THREAD
        return Rates(forward, sums, algebra, threads, ranks=self.count, assumed=True, halves=False)


def measure_rates(skeleton: Skeleton, recipe: Recipe, device: str) -> Rates:
    """Of a device that is here, in less than a second."""
    with use_products(recipe.products):
        forward, sums = _gemm_rate(device, skeleton.compute_dtype), _gemm_rate(device)
    algebra = _gemm_rate(device)
    threads = algebra * _GRID_SHARE / _THREAD if has_own_memory(device) else float(torch.get_num_threads())
    return Rates(forward, sums, algebra, threads, halves=not has_own_memory(device))


def _gemm_rate(device: str, dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s of ``device`` in a quarter second of the product that dominates a run."""
    size = 8192 if has_own_memory(device) else 1024
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    _ = a @ b
    synchronize(device)
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < 0.25:
        _ = a @ b
        synchronize(device)
        count += 1
    return count * 2 * size**3 / (time.perf_counter() - begin)


def estimate_seconds(
    skeleton: Skeleton,
    recipe: Recipe,
    layers: list[LayerSize],
    placement: Placement,
    rates: Rates,
    budget: Budget | None = None,
) -> dict[str, float]:
    """Estimated seconds by stage and ``total``; with several ranks also ``exchange``, with a ``budget`` ``measure``."""
    streams, tokens, blocks = recipe.streams, recipe.samples * recipe.length, len(skeleton.blocks)
    weights, states = sum(layer.rows * layer.cols for layer in layers), state_bytes(skeleton, recipe, tokens)
    before, after = sum(layer.bytes_before for layer in layers), sum(layer.bytes_after for layer in layers)
    groups = [group for index in range(blocks) for group in groups_of(skeleton, index)]
    reached = weights - sum(group.unreached * group.cols for group in groups)
    attention = blocks * 2 * recipe.length * skeleton.hidden_size  # of a token
    forward, algebra = _FORWARD * rates.forward, rates.algebra
    shapes = Counter((layer.rows, layer.cols) for layer in layers)
    sweeps = sum(count * flops.sweep(*shape) for shape, count in shapes.items())
    refined = sum(count * flops.refine(*shape, recipe.refine or 0) for shape, count in shapes.items())
    losses = sum(count * flops.layer_loss(*shape) for shape, count in shapes.items())
    passes = _REPLAYED if placement.replay else 1
    again = 5 * blocks * states if placement.disk_streams else 0  # for each group of a block, four, and the way out
    shared = {
        "calibrate": passes * streams * tokens * (2 * reached + attention) / forward,
        "hessian": sum(_sums(group, tokens, streams) for group in groups) / rates.sums,
        "grid": weights * grid_class(recipe.parsed).FIT_SECONDS_PER_WEIGHT / rates.threads,
        "solve": ((0 if recipe.parsed.method == "rtn" else sweeps) + refined) / (_SOLVE * algebra),
        "baseline": (sweeps + losses) / (_BASELINE * algebra),
    }
    if recipe.parsed.exact:
        exact = sum(count * flops.exact(*shape) for shape, count in shapes.items())
        shared["solve"] += exact / (_EXACT * algebra)
    # Not shared: every rank needs the factor and the correction whole, but those of experts, and one of them writes.
    factors = sum(-(-group.experts // rates.ranks) * flops.factor(group.cols, True, rates.halves) for group in groups)
    plain = [group for group in groups if group.experts == 1]
    measured = recipe.measures_correction
    corrected = sum(flops.correction(group.rows, group.cols, True, measured) for group in plain) * bool(recipe.correct)
    by_blocks = finishes_by_blocks(placement, flows_live(skeleton))
    tuned, finished = _tuning(skeleton, recipe, 2 * reached + attention, weights, rates, by_blocks)
    shared |= {"tune": tuned} if recipe.tune else {}
    if budget is not None:
        shared["measure"] = _measuring(skeleton, recipe, budget, groups, reached, attention, rates)
    alone = {
        **({"finish": finished} if recipe.finish else {}),  # rank 0, while the others wait
        "load": (before + again) / rates.read,
        "factor": factors / (_FACTOR * algebra) + corrected / (_CORRECT * algebra),
        "save": (2 * after + placement.disk_streams * blocks * states) / rates.disk,
        "check": (before + after) / rates.read,
    }
    if rates.ranks > 1:  # through rank 0, one rank after another: H and G there and back, and what was solved
        moved = sum(2 * (streams + measured) * _F32 * group.cols**2 for group in plain) + before
        moved += sum(group.experts * _F32 * group.cols**2 for group in groups if group.experts > 1)  # to their owners
        alone["exchange"] = moved * (rates.ranks - 1) / rates.link
    stages = dict.fromkeys(STAGES, 0.0) | {name: value / rates.ranks for name, value in shared.items()} | alone
    stages["save"] += _saving_states(skeleton, states, rates, sum(stages.values()))
    written = (
        recipe.written_windows * recipe.length * (2 * reached + attention + _of_head(skeleton))
    )  # by rank 0 for all
    stages["calibrate"] += written / (_WRITE * rates.forward)
    return {"total": round(sum(stages.values()), 1)} | {name: round(value, 2) for name, value in stages.items()}


def _saving_states(skeleton: Skeleton, size: int, rates: Rates, rest: float) -> float:
    """Seconds in which hidden states of ``size`` bytes are saved, where all else takes ``rest`` seconds."""
    if flows_live(skeleton):
        return 0.0
    each, blocks = size / rates.disk, len(skeleton.blocks)
    return blocks * each if rates.ranks > 1 else state_schedule.expected_seconds(size, each, blocks, rest)


def _of_head(skeleton: Skeleton) -> int:
    """Operations of the head for one token; 0 where there is none."""
    return 2 * skeleton.vocabulary * skeleton.hidden_size * skeleton.has_lm_head


def _tuning(
    skeleton: Skeleton, recipe: Recipe, flops_a_token: int, weights: int, rates: Rates, by_blocks: bool
) -> tuple[float, float]:
    """Seconds in which all blocks are tuned, and in which the whole model is finished."""
    together = count_step_windows(recipe.samples, recipe.length)
    batches, tokens, forward = recipe.samples // together, together * recipe.length, _FORWARD * rates.forward
    steps, grids = batches - count_held_out(batches), weights * _TUNED_SECONDS / rates.threads
    blocks, whole = (tokens * each / forward for each in (flops_a_token, flops_a_token + _of_head(skeleton)))
    tuned = (recipe.tune or 0) * steps * (_BACKWARD * blocks + grids)
    if recipe.draws:  # by the states alone a gradient takes as long as the pass
        tuned += batches * (1 + recipe.draws) * whole
    finished = (_BACKWARD + _ORIGINAL) * whole + grids
    finished += by_blocks * (_ORIGINAL * blocks + grids)  # each block runs once more for its gradient
    return tuned, (recipe.finish or 0) * steps * finished


def _measuring(
    skeleton: Skeleton,
    recipe: Recipe,
    budget: Budget,
    groups: list[Group],
    reached: int,
    attention: int,
    rates: Rates,
) -> float:
    """Seconds in which the losses of all widths and the distances of all units are measured (run/budget.py)."""
    measured = count_measured(skeleton, recipe.samples, recipe.length)
    probed = count_probed(skeleton, budget, recipe.samples, recipe.length, measured)
    tokens, short = measured * recipe.length, probed * min(recipe.length, PROBED_LENGTH)
    # A unit's stream goes through the blocks from its own on: half of them.
    passes = tokens + short * (1 + len(budget.units) / 2)
    head = 2 * skeleton.vocabulary * skeleton.hidden_size * short * (1 + len(budget.units)) * skeleton.has_lm_head
    forward = (passes * (2 * reached + attention) + head) / (_FORWARD * rates.forward)
    sums = sum(_sums(group, tokens, 1) for group in groups) / rates.sums
    factors = sum(min(group.experts, EXPERTS) * flops.factor(group.cols, True, rates.halves) for group in groups)
    shapes = (skeleton.shape(name) for unit in budget.units for name in unit.tried)
    tried = [(min(ROWS, rows), cols) for rows, cols in shapes]
    sweeps = len(budget.candidates) * sum(flops.sweep(*each) + 2 * flops.layer_loss(*each) for each in tried)
    weights = len(budget.candidates) * sum(rows * cols for rows, cols in tried)
    grids = weights * grid_class(recipe.parsed).FIT_SECONDS_PER_WEIGHT / rates.threads
    return forward + sums + factors / (_FACTOR * rates.algebra) + sweeps / (_SOLVE * rates.algebra) + grids


def _sums(group: Group, tokens: int, streams: int) -> float:
    """Operations of a group's Hessians. Experts have one each, and where they see few tokens one that they share."""
    panel = min(_SUMS_PANEL, group.cols)
    if group.experts == 1:
        return flops.hessian(tokens, group.cols, streams, panel)
    routed = tokens * group.copies
    few = routed < group.experts * group.cols
    return flops.hessian(routed, group.cols, 1, panel) * (1 + few)

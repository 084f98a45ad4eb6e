"""Block tuning: codes and grids of a whole block are refined together by gradient, after its linears were solved.

Each linear was solved for its own input and output. What the block as a whole gives is what the next block reads, so
here all linears move together, until the block gives on the quantized stream what the original block gives on the
original stream. In the forward pass the weights are those that the file will hold: parameters of grids rounded to their
stored dtype, codes to integers. The gradient passes over both roundings (Bengio et al. 2013, arXiv 1308.3432; for codes
as in AutoRound, Cheng et al. 2024, arXiv 2309.05516). The step of each number is measured in the units of its grid.

Tokens that are few fit the block and not the model. Some batches are therefore held out, from the Hessians too: after
each pass over the others the error on them is measured, and the state with the least of it is the result.

The same moves the grids of a whole model, whose codes stay (run/finishing.py).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from leangrid.grids.base import Grid, Precision
from leangrid.solve.gradient import NoGradient, gradients

_BETAS = (0.9, 0.95)  # of Adam
_WARM_UP = 4  # steps in which their size grows to its full value
_NEAREST = 0.45  # a code begins less than half a step away from where it would change
_PATIENCE = 3  # passes without a lower held-out error after which tuning ends, or half of all where those are more

_FEWEST = 4  # batches with which one can be held out
_SHARE = 8  # one batch of so many is held out
_STEP_TOKENS = 512  # of a batch, where a window has fewer
_STEPS = 64  # batches that there are at least in a pass, before windows share one

Error = Callable[[int, Mapping[str, Tensor]], Tensor]
Add = Callable[[Sequence[Tensor]], None]


@dataclass(frozen=True)
class Steps:
    """How often, and how far, the numbers move.

    Attributes:
        passes: how often every batch is seen.
        grid: size of a step of scales, offsets and levels, in units of their root mean square; None: that of the kind
            of grid.
        codes: size of a step of codes, in codes; 0: codes stay; None: that of the kind of grid.
        seed: of the order of batches.
    """

    passes: int
    grid: float | None = None
    codes: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class Tuning:
    """What tuning did to one block.

    Attributes:
        before, after: the mean error on the first of the batches that were tuned on, as many as are held out (all of
            them would take as long as half a pass).
        held_before, held_after: the same on those that were held out.
        best: the pass after which the held-out error was least; 0: it never fell, and the block is as it was solved.
        moved: share of the codes that changed.
        trouble: why tuning ended early, as a sentence; "" where it did not.
    """

    before: float = 0.0
    after: float = 0.0
    held_before: float = 0.0
    held_after: float = 0.0
    best: int = 0
    moved: float = 0.0
    trouble: str = ""

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON holds them."""
        return asdict(self)


def count_step_windows(windows: int, length: int) -> int:
    """How many of ``windows`` windows of ``length`` tokens one step is taken by: one, or several where they are short
    and many."""
    return max(1, min(_STEP_TOKENS // length, windows // _STEPS))


def count_held_out(batches: int) -> int:
    """How many of ``batches`` are held out; 0 where there are too few."""
    return max(1, batches // _SHARE) if batches >= _FEWEST else 0


def relative_error(given: Float[Tensor, "*batch width"], wanted: Float[Tensor, "*batch width"]) -> Float[Tensor, ""]:
    """The mean over tokens of |given - wanted|^2 / |wanted|^2: a few tokens are a thousand times larger than the
    others, and would else decide alone."""
    wanted, smallest = wanted.float(), torch.finfo(torch.float32).tiny
    off = given.float() - wanted
    return (off.square().sum(-1) / wanted.square().sum(-1).clamp(min=smallest)).mean()


class TunedLinear:
    """One linear whose codes and grid are to be moved.

    Args:
        codes, grid: as solved.
        target: the weight that was to be met, float32 [rows, cols]. A code begins as near to its neighbour as this is.
            None: codes stay.
        precision: of the container, which rounds the grid's parameters.
        steps: without a step of codes they stay.
    """

    def __init__(
        self,
        codes: UInt8[Tensor, "rows cols"],
        grid: Grid,
        target: Float[Tensor, "rows cols"] | None,
        precision: Precision,
        steps: Steps,
    ) -> None:
        self.codes, self.grid, self._precision = codes, grid, precision
        by_grid, by_codes = grid.TUNING_STEPS
        by_grid, by_codes = steps.grid or by_grid, by_codes if steps.codes is None else steps.codes
        self._parameters = grid.parameters.clone().requires_grad_()
        self._latent = None if target is None or not by_codes else _latent(codes, grid, target).requires_grad_()
        sizes = {self._parameters: by_grid * float(grid.parameters.square().mean().sqrt())}
        if self._latent is not None:
            sizes[self._latent] = by_codes
        self.leaves = list(sizes)
        self.groups = [{"params": [leaf], "size": size} for leaf, size in sizes.items()]

    def weight(self) -> Float[Tensor, "rows cols"]:
        """The weight that a file would hold, float32, differentiable by the leaves."""
        return _Stored.apply(self._parameters, self._latent, self.codes, self.grid, self._precision)

    def state(self) -> tuple[UInt8[Tensor, "rows cols"], Any]:
        """The present codes and grid."""
        codes = self.codes if self._latent is None else _codes_of(self._latent.detach(), self.grid)
        return self.grid.with_tuned(self._parameters.detach(), codes, self._precision)


def tune(
    linears: Mapping[str, TunedLinear],
    error: Error,
    fitted: Sequence[int],
    held_out: Sequence[int],
    steps: Steps,
    add: Add | None = None,
    watch: Callable[[int, float], None] = lambda turn, held: None,
    hold: bool = True,
) -> tuple[Tuning, dict[str, tuple[UInt8[Tensor, "rows cols"], Any]]]:
    """Move codes and grids of all ``linears`` together; the state with the least error on ``held_out`` is the result.

    Args:
        linears: the block's, by name.
        error: gives the mean error of the block's output on a batch, with weights by name; differentiable.
        fitted: the batches to move by, each once a pass.
        held_out: the batches to judge by; at least one.
        steps: how often and how far.
        add: adds to each of some tensors, in place, those of the other ranks, which tune the same linears by other
            batches: a step is then taken by one batch of each. None: there are no others.
        watch: is told each pass that was made, counted from 1, and the mean error on ``held_out`` after it.
        hold: whether a weight that ``error`` has read is kept until the batch is done. False: it is made again each
            time it is read, for an ``error`` that needs few of them at once.

    Returns:
        What was done, and codes and grid of each linear. Where a number stops being finite, tuning ends with the best
        state before it, and says so.
    """
    solved = {name: (one.codes, one.grid) for name, one in linears.items()}
    together = _Together(add, hold)
    shown = fitted[: len(held_out)]
    start, best = (together.mean(linears, error, batches) for batches in (shown, held_out))
    tuning, state = Tuning(start, start, best, best), solved
    if not 0 < start < math.inf or not best < math.inf:
        nothing = "the error is 0 as it was solved" if start == 0 else "the error is not finite"
        return Tuning(trouble=nothing), solved
    rounds = together.most(len(fitted))
    mover = _Mover(linears, error, start, rounds * steps.passes, together)
    order = torch.Generator().manual_seed(steps.seed)
    for turn in range(1, steps.passes + 1):
        batches = [fitted[number] for number in torch.randperm(len(fitted), generator=order).tolist()]
        try:
            finite = all(mover.step(batch) for batch in [*batches, *[None] * (rounds - len(batches))])
            trouble = "" if finite else f"an error or a gradient was not finite in pass {turn}"
        except NoGradient as failure:
            trouble = str(failure)
        if trouble:
            tuning = replace(tuning, trouble=trouble)
            break
        held = together.mean(linears, error, held_out)
        watch(turn, held)
        if held < tuning.held_after:
            state = {name: one.state() for name, one in linears.items()}
            tuning = replace(tuning, held_after=held, best=turn)
        elif turn - tuning.best >= max(_PATIENCE, steps.passes // 2):  # in a long run steps are still large then
            break
    if tuning.best:
        tuning = replace(tuning, after=together.mean(state, error, shown), moved=_moved(solved, state))
    return tuning, state


class _Mover:
    """Adam over the leaves of all linears. The steps grow in the beginning and shrink to nothing at the end."""

    def __init__(
        self, linears: Mapping[str, TunedLinear], error: Error, unit: float, count: int, together: "_Together"
    ) -> None:
        self._linears, self._error, self._unit, self._together = linears, error, unit, together
        self._count, self._done = count, 0
        self._leaves = [leaf for one in linears.values() for leaf in one.leaves]
        self._adam = torch.optim.Adam([group for one in linears.values() for group in one.groups], betas=_BETAS)

    def step(self, batch: int | None) -> bool:
        """Move once by ``batch`` (None: by those of other ranks alone); whether everything was finite, else nothing
        moves."""
        size = min(1.0, (self._done + 1) / _WARM_UP) * (0.5 + 0.5 * math.cos(math.pi * self._done / self._count))
        for group in self._adam.param_groups:
            group["lr"] = group["size"] * size
        loss, slopes = self._slopes(batch)
        self._together.average([loss, *slopes], counted=batch is not None)
        if not bool(torch.stack([loss, *(slope.sum() for slope in slopes)]).isfinite().all()):
            return False
        for leaf, slope in zip(self._leaves, slopes, strict=True):
            leaf.grad = slope
        self._adam.step()
        self._done += 1
        return True

    def _slopes(self, batch: int | None) -> tuple[Tensor, list[Tensor]]:
        """The error of ``batch`` and its gradient by every leaf; zeros without a batch, and for an expert without
        tokens."""
        if batch is None:
            return self._leaves[0].new_zeros(()), [torch.zeros_like(leaf) for leaf in self._leaves]
        with torch.enable_grad():
            loss = self._error(batch, self._together.weights(self._linears)) / self._unit
            slopes = gradients(loss, self._leaves)
        return loss.detach().float(), [slope.contiguous() for slope in slopes]


class _Together:
    """Sums over all ranks."""

    def __init__(self, add: Add | None, hold: bool) -> None:
        self._alone, self._hold = add is None, hold
        self._add: Add = add or (lambda tensors: None)

    def mean(self, linears: Mapping[str, Any], error: Error, batches: Sequence[int]) -> float:
        """The mean error over the batches of all ranks, with the linears as they are, or with (codes, grid) of each."""
        with torch.no_grad():
            weights = self.weights(linears)
            errors = [float(error(batch, weights)) for batch in batches]
        total = torch.tensor([sum(errors), len(errors)]).double()
        self._add([total])
        return float(total[0] / total[1])

    def weights(self, linears: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """The weight of each linear, made when it is read."""
        return _Weights(linears, self._hold)

    def most(self, count: int) -> int:
        """The largest ``count`` of any rank; they differ by one at most."""
        total = torch.tensor([count, 1]).double()
        self._add([total])
        return math.ceil(float(total[0] / total[1]))

    def average(self, tensors: list[Tensor], counted: bool) -> None:
        """Replace each tensor by its mean over the ranks that are ``counted``."""
        if self._alone:
            return
        count = torch.tensor([float(counted)])
        self._add([count, *tensors])
        for tensor in tensors:
            tensor /= float(count)


class _Weights(Mapping[str, Tensor]):
    """The weights of linears, or of (codes, grid) of each, by name; made when they are read, and with ``hold`` kept."""

    def __init__(self, linears: Mapping[str, Any], hold: bool) -> None:
        self._linears, self._hold = linears, hold
        self._made: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name in self._made:
            return self._made[name]
        one = self._linears[name]
        weight = one.weight() if isinstance(one, TunedLinear) else one[1].dequantize(one[0])
        if self._hold:
            self._made[name] = weight
        return weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._linears)

    def __len__(self) -> int:
        return len(self._linears)


class _Stored(torch.autograd.Function):
    """Weights of parameters and codes (of those with a fraction, where there are such), as a file holds them."""

    @staticmethod
    def forward(
        ctx: Any, parameters: Tensor, latent: Tensor | None, codes: Tensor, grid: Grid, precision: Precision
    ) -> Tensor:
        codes = codes if latent is None else _codes_of(latent, grid)
        ctx.save_for_backward(codes)
        ctx.grid = grid
        return grid.dequantize_at(parameters, codes, precision)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (codes,), (gradient,) = ctx.saved_tensors, gradients
        by_codes = gradient * ctx.grid.spacing(codes) if ctx.needs_input_grad[1] else None
        return ctx.grid.parameter_gradient(codes, gradient), by_codes, None, None, None


def _latent(codes: Tensor, grid: Grid, target: Tensor) -> Tensor:
    """Codes with a fraction: how far the target is from the level, in steps of the grid."""
    off = (target - grid.dequantize(codes)) / grid.spacing(codes)
    return codes.float() + torch.nan_to_num(off).clamp_(-_NEAREST, _NEAREST)


def _codes_of(latent: Tensor, grid: Grid) -> Tensor:
    return latent.round().clamp_(0, 2**grid.bits - 1).to(torch.uint8)


def _moved(solved: Mapping[str, Any], state: Mapping[str, Any]) -> float:
    """The share of the codes by which the two states differ."""
    changed = sum(int((state[name][0] != codes).sum()) for name, (codes, _) in solved.items())
    return round(changed / sum(codes.numel() for codes, _ in solved.values()), 6)

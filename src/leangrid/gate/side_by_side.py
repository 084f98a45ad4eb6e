"""The gate's two models walked block by block, side by side, and what comes out of them."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from leangrid.formats import FORMATS
from leangrid.grids import Precision, grid_class
from leangrid.machine import memory
from leangrid.models.calls import fill
from leangrid.models.flow import Flow, open_flow
from leangrid.models.linears import rows_first
from leangrid.models.model_inputs import Inputs, moved_inputs
from leangrid.models.skeleton import Skeleton
from leangrid.models.whole import result_of
from leangrid.recipe import Recipe

_PROBED = 64  # tokens of a window on which linears are compared one by one


@dataclass(frozen=True)
class Walked:
    """What comes out of the walk, one entry a window, for each text: the original's, the result's and plain rounding's
    (empty where it is not walked). An entry is the hidden states that leave the last block [1, length, hidden], or what
    the model's own forward returned where it was held at its blocks (flow.py).

    ``errors``: of each linear, |y^ - y| / |y| on the original's inputs."""

    original: list[list[Any]]
    result: list[list[Any]]
    rounded: list[list[Any]]
    errors: dict[str, float]


@torch.no_grad()
def walk(
    original: Skeleton, result: Skeleton, texts: Sequence[Sequence[Inputs]], rounding: Recipe | None, device: str
) -> Walked:
    """Walk both models through ``texts``, each of some windows (token ids, int64 [1, length], or a row with pictures),
    with one block of each in memory.

    ``rounding``: None, or the recipe by whose schemes the original's weights are rounded to the nearest level for a
    third walk."""
    # One at a time: a run that was short of memory had room for no more.
    windows = [window for text in texts for window in text]
    theirs, ours = _Walker(original, windows, device), _Walker(result, windows, device)
    rounded = _Walker(original, windows, device, theirs) if rounding is not None else None
    errors: dict[str, float] = {}
    try:
        for index in original.structure.order:
            with original.load_block(index, device) as block, result.load_block(index, device) as quantized:
                names = [name for group in original.groups(index) for name in group]
                with _probed(block, quantized, names, partial(original.linear_name, index), errors):
                    theirs.through(index, block)
                ours.through(index, quantized)
                if rounding is not None and rounded is not None:
                    _round(original, block, index, names, rounding)
                    rounded.through(index, block)
            memory.return_freed_memory()  # two models' blocks in turn leave holes: 3 to 10 MB more a block
        found = [[] if one is None else _by_text(one.ends(), texts) for one in (theirs, ours, rounded)]
        return Walked(found[0], found[1], found[2], errors)
    finally:
        for one in (rounded, theirs, ours):
            if one is not None:
                one.close()


class _Walker:
    """One model on its way through its blocks, a window at a time.

    Args:
        beside: another walker of the same model, whose flow this one shares.
    """

    def __init__(self, skeleton: Skeleton, windows: list[Inputs], device: str, beside: "_Walker | None" = None) -> None:
        self._flow: Flow = open_flow(skeleton, device) if beside is None else beside._flow
        self._stream = "original" if beside is None else "rounded"
        self._own = beside is None
        if beside is None:
            self._states = self._flow.enter(windows, lambda hidden: hidden, "original", "rounded")
        else:
            self._states = list(beside._states)

    def through(self, index: int, block: nn.Module) -> None:
        """Through ``block`` and on to the next."""
        flow, stream = self._flow, self._stream
        left = [flow.call(stream, batch, index, block, hidden) for batch, hidden in enumerate(self._states)]
        _, self._states = flow.advance(stream, left)

    def ends(self) -> list[Any]:
        """What each window came to."""
        return self._states if self._flow.waits else self._flow.finals(self._stream)

    def close(self) -> None:
        if self._own:
            self._flow.close()


def outputs(
    skeleton: Skeleton, windows: Iterable[Inputs], ends: Iterable[Any], device: str
) -> Iterator[Float[Tensor, "length out"]]:
    """What the model computes after its blocks, window by window: logits, or the last hidden states of a model without
    a language-model head.

    The whole model runs with empty blocks, each of which returns the states that left the last one whatever its input
    is; or with a base model that returns what it returned before."""
    with skeleton.load_outside_blocks(device, lm_head=skeleton.has_lm_head):
        for window, end in zip(windows, ends, strict=True):
            if skeleton.entry is skeleton.model and not isinstance(end, Tensor):
                output: Any = end  # the whole model was walked
            elif not isinstance(end, Tensor) and not skeleton.has_lm_head:
                output = end
            else:
                with _handing(skeleton, end):
                    moved = moved_inputs(window, device, skeleton.compute_dtype)
                    output = skeleton.run(moved, whole=skeleton.has_lm_head)
            yield result_of(output, skeleton.has_lm_head)[0].cpu()


@contextmanager
def _handing(skeleton: Skeleton, end: Any) -> Iterator[None]:
    """Context: the blocks, or the base model, return ``end``."""
    held = skeleton.blocks if isinstance(end, Tensor) else [skeleton.base]
    for number, module in enumerate(held):
        shape = skeleton.structure.blocks[number].returns
        given = fill(shape, end) if isinstance(end, Tensor) else end
        module.forward = lambda *_args, given=given, **_kwargs: given
    try:
        yield
    finally:
        for module in held:
            del module.forward


def _by_text(states: list[Any], texts: Sequence[Sequence[Inputs]]) -> list[list[Any]]:
    """What belongs to the windows of each text."""
    counts = [len(text) for text in texts]
    return [states[sum(counts[:number]) : sum(counts[: number + 1])] for number in range(len(counts))]


def _round(original: Skeleton, block: nn.Module, index: int, names: Sequence[str], recipe: Recipe) -> None:
    """Put each linear's weights on the nearest levels of the min-max grid of its scheme."""
    stored = FORMATS[recipe.format].precision(original.dtype)
    for name in names:
        module = block.get_submodule(name)
        own = recipe.for_layer(original.linear_name(index, name))
        module.get_parameter("weight").data = rounded_weight(module, own, stored)


def rounded_weight(module: nn.Module, recipe: Recipe, precision: Precision) -> Tensor:
    """The weight of a linear, as the module stores it, on the nearest levels of the min-max grid of the recipe's
    scheme, whose parameters ``precision`` rounds."""
    weight = module.get_parameter("weight")
    values = rows_first(module, weight.data).float().contiguous()
    scheme = recipe.scheme_for(values.shape[1])
    grid = grid_class(scheme).fit_minmax(values, scheme, precision.for_scheme(scheme))
    return rows_first(module, grid.dequantize(grid.nearest(values))).to(weight.dtype).contiguous()


@contextmanager
def _probed(
    block: nn.Module, quantized: nn.Module, names: list[str], name_of: Callable[[str], str], errors: dict[str, float]
) -> Iterator[None]:
    """Inside the ``with``, each linear of ``block`` that runs is compared with its twin on the same inputs: |y^ - y| /
    |y|."""

    def compare(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            read, path = args[0] if args else next(iter(kwargs.values())), name_of(name)
            expected = output[..., :_PROBED, :].float()
            got = quantized.get_submodule(name)(read[..., :_PROBED, :].contiguous()).float()
            error = float((got - expected).norm() / expected.norm().clamp_min(torch.finfo(torch.float32).tiny))
            errors[path] = max(errors.get(path, 0.0), error if math.isfinite(error) else 1e30)

        return hook

    hooks = [block.get_submodule(name).register_forward_hook(compare(name), with_kwargs=True) for name in names]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()

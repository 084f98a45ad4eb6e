"""The gate's two models walked block by block, side by side, and what comes out of them."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from leangrid.formats import FORMATS
from leangrid.grids import grid_class
from leangrid.machine import memory
from leangrid.models.skeleton import Skeleton
from leangrid.models.streams import hidden_of, run_to_first_block
from leangrid.recipe import Recipe

_PROBED = 64  # tokens of a window on which linears are compared one by one


@dataclass(frozen=True)
class Walked:
    """Hidden states that leave the last block, a tensor [windows, length, hidden] for each text: the original's, the
    result's and plain rounding's (empty where it is not walked). ``errors``: of each linear, |y^ - y| / |y| on the
    original's inputs."""

    original: list[Tensor]
    result: list[Tensor]
    rounded: list[Tensor]
    errors: dict[str, float]


@torch.no_grad()
def walk(original: Skeleton, result: Skeleton, texts: Sequence[Tensor], rounding: Recipe | None, device: str) -> Walked:
    """Walk both models through ``texts`` (token ids, int64 [windows, length]), with one block of each in memory.

    ``rounding``: None, or the recipe by whose schemes the original's weights are rounded to the nearest level for a
    third walk."""
    # One at a time: a run that was short of memory had room for no more.
    windows = [window for ids in texts for window in ids.split(1)]
    theirs, their_calls = run_to_first_block(original, windows, device)
    ours, our_calls = run_to_first_block(result, windows, device)
    rounded = theirs if rounding is not None else []
    errors: dict[str, float] = {}
    for index in range(len(original.blocks)):
        with original.load_block(index, device) as block, result.load_block(index, device) as quantized:
            names = [name for group in original.groups(index) for name in group]
            with _probed(block, quantized, names, f"{original.block_name(index)}.", errors):
                theirs = [_through(block, x, *their_calls.of(index, len(x), x.device)) for x in theirs]
            ours = [_through(quantized, x, *our_calls.of(index, len(x), x.device)) for x in ours]
            if rounding is not None:
                _round(original, block, index, names, rounding)
            rounded = [_through(block, x, *their_calls.of(index, len(x), x.device)) for x in rounded]
        memory.return_freed_memory()  # two models' blocks in turn leave holes: 3 to 10 MB more a block
    return Walked(_by_text(theirs, texts), _by_text(ours, texts), _by_text(rounded, texts), errors)


def outputs(skeleton: Skeleton, ids: Tensor, hidden: Tensor, device: str) -> Iterator[Float[Tensor, "length out"]]:
    """What the model computes after its blocks, window by window: logits, or the last hidden states of a model without
    a language-model head.

    The whole model runs with empty blocks, each of which returns ``hidden`` whatever its input is."""
    with skeleton.load_outside_blocks(device, lm_head=skeleton.has_lm_head) as model:
        for window, handed in zip(ids.split(1), hidden.split(1), strict=True):
            for block in skeleton.blocks:
                block.forward = lambda *_args, handed=handed, **_kwargs: handed
            try:
                output: Any = model(input_ids=window.to(device), use_cache=False)
            finally:
                for block in skeleton.blocks:
                    del block.forward
            yield (output.logits if skeleton.has_lm_head else output.last_hidden_state)[0].cpu()


def _by_text(states: list[Tensor], texts: Sequence[Tensor]) -> list[Tensor]:
    """The windows' states, those of each text together; empty where nothing was walked."""
    counts = [len(ids) for ids in texts] if states else []
    return [torch.cat(states[sum(counts[:number]) : sum(counts[: number + 1])]) for number in range(len(counts))]


def _through(block: nn.Module, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return hidden_of(block(hidden, *args, **kwargs))


def _round(original: Skeleton, block: nn.Module, index: int, names: Sequence[str], recipe: Recipe) -> None:
    """Put each linear's weights on the nearest levels of the min-max grid of its scheme."""
    transposed = original.architecture.transposed
    stored = FORMATS[recipe.format].precision(original.dtype)
    for name in names:
        weight: Any = block.get_submodule(name).weight
        values = transposed(weight).float().contiguous()
        scheme = recipe.for_layer(f"{original.block_name(index)}.{name}").scheme_for(values.shape[1])
        grid = grid_class(scheme).fit_minmax(values, scheme, stored.for_scheme(scheme))
        rounded = grid.dequantize(grid.nearest(values))
        weight.data = transposed(rounded).to(weight.dtype).contiguous()


@contextmanager
def _probed(
    block: nn.Module, quantized: nn.Module, names: list[str], prefix: str, errors: dict[str, float]
) -> Iterator[None]:
    """Inside the ``with``, each linear of ``block`` that runs is compared with its twin on the same inputs: |y^ - y| /
    |y|."""

    def compare(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            expected = output[..., :_PROBED, :].float()
            got = quantized.get_submodule(name)(args[0][..., :_PROBED, :].contiguous()).float()
            error = float((got - expected).norm() / expected.norm().clamp_min(torch.finfo(torch.float32).tiny))
            errors[prefix + name] = max(errors.get(prefix + name, 0.0), error if math.isfinite(error) else 1e30)

        return hook

    hooks = [block.get_submodule(name).register_forward_hook(compare(name)) for name in names]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()

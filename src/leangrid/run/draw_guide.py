"""Draws what guides block tuning (run/guide.py): gradients of the original model's predictions at each block's output.

It is done before the first block, by the model as a whole, for each token of this rank's windows. The gradients wait
where hidden states do, in bfloat16, until their block is done. A resumed run draws the same ones again for the blocks
that are left.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from leangrid.errors import Interrupted
from leangrid.machine.devices import is_out_of_memory
from leangrid.metrics.fisher import draw_gradients
from leangrid.models.calls import first_tensor
from leangrid.models.whole import WholeModel, load_whole
from leangrid.run.guide import Guide
from leangrid.run.run import Run
from leangrid.solve.gradient import NoGradient, why_none
from leangrid.solve.rescue import Rescue

_MOST_WINDOWS = 1_000_003  # between the seeds of two recipes


def draw_guide(run: Run) -> Guide | None:
    """Draw the gradients of the blocks that are left; None where the recipe asks for none, where no window can be held
    out, or where the model lets no gradient through, which is recorded.

    Raises:
        Interrupted: out of memory.
    """
    left, draws = run.remaining_blocks(), run.recipe.draws
    if not draws or not run.held_out or not left:
        return None
    run.progress.report("notice", left.start, message=f"drawing {draws} gradients a token, by which blocks are tuned")
    try:
        with run.stage("tune"), load_whole(run.skeleton, run.whole_device) as model:
            return Guide(_draw_all(run, model, draws), run.states.get)
    except NoGradient as failure:
        run.writer.reductions.append(Rescue("unguided", str(failure)))
        run.progress.report("notice", left.start, message=f"blocks are tuned by their own outputs alone: {failure}")
        return None
    except RuntimeError as failure:
        if not is_out_of_memory(failure):
            raise
        way_out = "Free memory, or start again with --guide 0 --restart"
        raise Interrupted("out of memory while gradients are drawn", run.journal.partial, way_out) from None


def _draw_all(run: Run, model: WholeModel, draws: int) -> dict[int, Any]:
    """Block -> the gradients of all windows of this rank, as Guide holds them."""
    left = run.remaining_blocks()
    batches, before = run.own_batches()
    blocks = [run.skeleton.blocks[index] for index in left]
    drawn: dict[int, Any] = {index: [] for index in left}
    done = 0
    for inputs in batches:
        generator = torch.Generator().manual_seed((run.recipe.seed * _MOST_WINDOWS + before + done) % 2**63)
        with torch.enable_grad(), _outputs_of(blocks) as outputs:
            predicted = _predicted(model, inputs)
            found = draw_gradients(predicted, outputs(), draws, generator, run.skeleton.has_lm_head)
        windows = len(inputs) if isinstance(inputs, Tensor) else 1
        for index, gradients in zip(left, found, strict=True):
            if not run.flow.waits:
                drawn[index].append(run.states.put(gradients.to(torch.bfloat16)))
                continue
            of_windows = gradients.transpose(0, 1).to(torch.bfloat16)
            if not done:
                drawn[index] = run.states.put(of_windows.new_empty((run.own_windows, *of_windows.shape[1:])))
            drawn[index][done : done + windows] = of_windows
        done += windows
    return drawn


def _predicted(model: WholeModel, inputs: Any) -> Tensor:
    """The model's output; NoGradient where its own code refuses states by which a gradient is asked for."""
    try:
        return model(inputs)
    except RuntimeError as failure:
        if is_out_of_memory(failure):
            raise
        raise NoGradient(why_none(failure)) from None


@contextmanager
def _outputs_of(blocks: Sequence[nn.Module]) -> Iterator[Callable[[], list[Tensor]]]:
    """Context: gives the states that left each block in its last call. Gradients begin with those of the first."""
    kept: dict[int, Tensor] = {}

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        states = first_tensor(output)
        if not states.requires_grad:
            states.requires_grad_()
        kept[id(module)] = states

    hooks = [block.register_forward_hook(keep) for block in {id(block): block for block in blocks}.values()]
    try:
        yield lambda: [kept[id(block)] for block in blocks]
    finally:
        for hook in hooks:
            hook.remove()

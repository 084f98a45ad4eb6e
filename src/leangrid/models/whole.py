"""A model with all its weights in memory, run with other weights in some of its linears."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from leangrid.models.linears import rows_first
from leangrid.models.model_inputs import Inputs, moved_inputs
from leangrid.models.skeleton import Skeleton


class WholeModel(nn.Module):
    """The model of ``skeleton`` while all its weights are loaded (``load_whole``)."""

    def __init__(self, skeleton: Skeleton, device: torch.device | str) -> None:
        super().__init__()
        self.model = skeleton.model
        self._skeleton, self._device = skeleton, device

    def forward(self, inputs: Inputs) -> Tensor:
        """The logits [windows, length, vocabulary] of ``inputs``, token ids int64 [windows, length] or a row with
        pictures; of a model without a language-model head its last hidden states [windows, length, hidden]."""
        moved = moved_inputs(inputs, self._device, self._skeleton.compute_dtype)
        return result_of(self._skeleton.run(moved, whole=self._skeleton.has_lm_head), self._skeleton.has_lm_head)

    def with_weights(self, weights: Mapping[str, Tensor], inputs: Inputs) -> Tensor:
        """As ``forward``, with ``weights`` [rows, cols] of linears, by their paths in the model; differentiable by
        them."""
        named = {f"model.{path}.weight": self._as_held(path, weights) for path in weights}
        return functional_call(self, named, (inputs,))

    def with_weights_by_blocks(self, weights: Mapping[str, Tensor], inputs: Inputs) -> Tensor:
        """The same, but each block reads its weights when it is called, and again for its gradient, for which it runs
        a second time (Chen et al. 2016, arXiv 1604.06174): one block's are there at once.

        For models in which nothing but hidden states flows between the blocks: what a block leaves elsewhere would be
        left twice."""
        with ExitStack() as replaced:
            for path, own in self._linears.items():
                block = self.model.get_submodule(path)
                replaced.callback(block.__dict__.pop, "forward")
                block.forward = partial(self._call_block, block.forward, path, own, weights)
            return self(inputs)

    @cached_property
    def _linears(self) -> dict[str, list[str]]:
        """Block -> its quantized linears, as paths in the model."""
        return {
            block.path: [f"{block.path}.{name}" for group in block.groups for name in group]
            for block in self._skeleton.structure.blocks
        }

    def _call_block(
        self,
        forward: Callable[..., Any],
        path: str,
        names: list[str],
        weights: Mapping[str, Tensor],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """``forward`` of the block at ``path`` with ``weights`` of its linears ``names``."""
        called = _Called(self.model.get_submodule(path), forward)

        def call(*args: Any, **kwargs: Any) -> Any:
            named = {f"block{name.removeprefix(path)}.weight": self._as_held(name, weights) for name in names}
            return functional_call(called, named, args, kwargs)

        if not torch.is_grad_enabled():
            return call(*args, **kwargs)
        return checkpoint(call, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    def _as_held(self, path: str, weights: Mapping[str, Tensor]) -> Tensor:
        """The weight of the linear at ``path`` as the model holds it: its order of rows, device and dtype."""
        linear = self.model.get_submodule(path)
        own = linear.get_parameter("weight")
        return rows_first(linear, weights[path]).to(own.device, own.dtype)


class _Called(nn.Module):
    """A block, called by ``forward``, which was its own before another took its place."""

    def __init__(self, block: nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.block, self._forward = block, forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(*args, **kwargs)


@contextmanager
def load_whole(skeleton: Skeleton, device: torch.device | str) -> Iterator[WholeModel]:
    """Context: the model with all its weights on ``device``, in the compute dtype; released at the end."""
    with ExitStack() as loaded:
        loaded.enter_context(skeleton.load_outside_blocks(device, lm_head=skeleton.has_lm_head))
        for index in range(len(skeleton.blocks)):
            loaded.enter_context(skeleton.load_block(index, device))
        yield WholeModel(skeleton, device)


def result_of(output: Any, has_lm_head: bool) -> Tensor:
    """The logits of a model's output, or its last hidden states."""
    wanted = ("logits", "last_hidden_state") if has_lm_head else ("last_hidden_state", "logits")
    found = next((getattr(output, name) for name in wanted if isinstance(getattr(output, name, None), Tensor)), None)
    return output[0] if found is None else found

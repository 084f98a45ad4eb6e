"""A model with all its weights in memory, run with other weights in some of its linears."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

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
        named = {}
        for path, weight in weights.items():
            linear = self.model.get_submodule(path)
            own = linear.get_parameter("weight")
            named[f"model.{path}.weight"] = rows_first(linear, weight).to(own.device, own.dtype)
        return functional_call(self, named, (inputs,))


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

"""A source in fewer bits than 16 as transformers loads a state dict: each tensor is dequantized when transformers asks
for it.

transformers itself dequantizes FP8 and MXFP4, but not without a second copy of all weights, and not ModelOpt's."""

from collections.abc import Mapping
from threading import Lock
from typing import Any, TypeGuard

import torch
from torch import Tensor

from leangrid.storage.source import Checkpoint


class LazyTensor:
    """A tensor of a checkpoint that is read when it is indexed, as transformers indexes the tensors of a file."""

    def __init__(self, checkpoint: Checkpoint, name: str, reading: Lock) -> None:
        self._checkpoint, self._name, self._reading = checkpoint, name, reading
        info = checkpoint.tensors[name]
        self.shape, self.dtype = torch.Size(info.shape), info.torch_dtype

    def __getitem__(self, index: Any) -> Tensor:
        """The whole tensor for ``...``, else that part of it. Raises what ``Checkpoint.read`` raises."""
        with self._reading:  # transformers reads in several threads; a checkpoint has one open file
            return self._checkpoint.read(self._name)[index]


def lazy_state_dict(checkpoint: Checkpoint) -> Mapping[str, LazyTensor]:
    """The tensors of a checkpoint by name, for ``from_pretrained(None, config=..., state_dict=...)``."""
    reading = Lock()
    return {name: LazyTensor(checkpoint, name, reading) for name in checkpoint.tensors}


def is_dequantized(checkpoint: object) -> TypeGuard[Checkpoint]:
    """Whether a source's weights are stored in fewer bits than 16."""
    return isinstance(checkpoint, Checkpoint) and checkpoint.stored_as is not None

"""How many bytes of tensors are alive: every storage that an operation returns, until it is freed. The plan is held to
it."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """In a ``with``: ``peak`` is the most bytes that tensors made inside it held at once. What an operation allocates
    and frees by itself is not seen; tensors on the meta device do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._add((args, kwargs), counts=False)  # made before the ``with``
        result = func(*args, **(kwargs or {}))
        self._add(result, counts=True)
        return result

    def _add(self, values: Any, counts: bool) -> None:
        for tensor in tree_leaves(values):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                self._storage(tensor.untyped_storage(), counts)

    def _storage(self, storage: torch.UntypedStorage, counts: bool) -> None:
        key, size = storage._cdata, storage.nbytes() if counts else 0
        if key in self._known and self._known[key]() is not None:
            return
        self.now += size
        self.peak = max(self.peak, self.now)

        def gone(_: Any) -> None:
            self.now -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, gone)

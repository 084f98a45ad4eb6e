"""Where hidden states wait between their turns, and what a run does when memory runs out.

Between two blocks every calibration window has a hidden state in each stream. The placement says whether these are on
the device, in host memory or in mapped files, how many windows pass a block at once, and how the algebra is arranged.
When an attempt at a block runs out of memory, the next smaller placement is used from there on, and recorded."""

import gc

import torch
from torch import Tensor

from leangrid.errors import Interrupted
from leangrid.machine.devices import copy_to_host, has_own_memory, release_cached_memory
from leangrid.models.skeleton import Skeleton
from leangrid.planning.footprint import Demand, sum_footprint
from leangrid.planning.placement import Failed, Placement
from leangrid.recipe import Recipe
from leangrid.solve.rescue import Rescue
from leangrid.storage.mapped import MappedTensors


class StatePlaces:
    """Keeps hidden states where the placement says.

    Attributes:
        placement: the present one; ``reduce`` changes it.
        reductions: what was reduced for the block at work, as rescues of kind "memory".
        failing: what would have failed if memory ran out now: a forward pass, or the algebra of a group by its number.
    """

    def __init__(self, placement: Placement, device: str, mapped: MappedTensors) -> None:
        self.placement, self.reductions = placement, list[Rescue]()
        self.failing: tuple[Failed, int] = ("forward", 0)
        self._device, self._mapped = device, mapped

    def put(self, hidden: Tensor) -> Tensor:
        """A batch of hidden states that leaves a block, where it waits."""
        if self.placement.disk_streams:
            return self._mapped.store(hidden)
        return copy_to_host(hidden) if self.placement.host_streams else hidden.to(self._device)

    def get(self, hidden: Tensor, device: torch.device) -> Tensor:
        """A batch that waited, on ``device``."""
        if self.placement.disk_streams:
            return self._mapped.load_copy(hidden, device)
        return hidden.to(device, non_blocking=True)

    def algebra_device(self, group: int) -> torch.device:
        """Where the Hessian of ``group`` is summed, factored and solved."""
        return torch.device("cpu" if group in self.placement.host_groups else self._device)

    def reduce(self, skeleton: Skeleton, recipe: Recipe, windows: Tensor, index: int) -> str:
        """Use the next smaller placement, after block ``index`` ran out of memory; returns the change in words.

        Raises:
            Interrupted: there is none.
        """
        gc.collect()
        release_cached_memory(self._device)
        smaller = self.placement.reduced(*self.failing, len(skeleton.groups(index)), has_own_memory(self._device))
        if smaller is None:
            samples, length = windows.shape
            demand = Demand.of(skeleton, recipe, samples, length, self._device)
            needed = sum_footprint(demand, self.placement).peak
            raise Interrupted(
                f"out of memory, and no smaller way is left: a block needs about {needed / 2**30:.2f} GiB",
                skeleton.block_name(index),
                "Finished blocks are kept: free memory, or go on with more of it",
            )
        self.placement, words = smaller
        self.reductions.append(Rescue("memory", f"out of memory: {words}"))
        return words

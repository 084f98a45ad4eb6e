"""The new weights of blocks that are committed, read from what the journal holds of them."""

from collections.abc import Iterator, Mapping
from functools import cached_property

import torch
from torch import Tensor, nn

from leangrid.formats import FORMATS
from leangrid.grids.base import Grid
from leangrid.models.linears import rows_first
from leangrid.models.skeleton import Skeleton
from leangrid.planning.sizes import stored_schemes
from leangrid.recipe import Recipe
from leangrid.schemes import Scheme
from leangrid.storage.journal import Journal
from leangrid.storage.safetensors import TensorInfo, read_named


class CommittedWeights:
    """Reads the weights of committed blocks.

    Args:
        skeleton, recipe, journal: those of the run; the recipe resolved.
    """

    def __init__(self, skeleton: Skeleton, recipe: Recipe, journal: Journal) -> None:
        self._skeleton, self._recipe, self._journal = skeleton, recipe, journal

    @cached_property
    def _schemes(self) -> dict[str, Scheme]:
        return stored_schemes(self._skeleton, self._recipe)

    def of(self, index: int, block: nn.Module) -> Mapping[str, Tensor]:
        """The new weight of each quantized linear of ``block``, number ``index``, as its module stores it, on the
        device and in the dtype of its parameter: what a reader of the file multiplies by."""
        container, found, dtype = FORMATS[self._recipe.format], {}, self._skeleton.dtype
        for name, codes, grid in self.solved(index):
            module = block.get_submodule(name)
            parameter = module.get_parameter("weight")
            weight = container.dequantize(codes, grid, dtype).to(parameter.device, parameter.dtype)
            found[name] = rows_first(module, weight).contiguous()
        return found

    def solved(self, index: int) -> Iterator[tuple[str, Tensor, Grid]]:
        """Of each quantized linear of block ``index`` its path in the block, and codes and grid as they are stored."""
        container, dtype, infos = FORMATS[self._recipe.format], self._skeleton.dtype, self._located(index)
        for name in (name for group in self._skeleton.groups(index) for name in group):
            path = self._skeleton.linear_name(index, name)
            scheme, shape = self._schemes[path], self._skeleton.shape(path)
            names = {suffix: f"{path}.{suffix}" for suffix in container.layout(scheme, shape, dtype)}
            stored = read_named(infos, names.values())
            tensors = {suffix: stored[full] for suffix, full in names.items()}
            yield name, *container.unpack(tensors, scheme, shape, path)

    def differing(self, index: int, solved: Mapping[str, tuple[Tensor, Grid]]) -> dict[str, Tensor]:
        """The container's tensors, by their names in the result, of linears of block ``index`` with other codes and
        grids, by their paths in the block; of them those that are not as they are stored."""
        container, dtype, found = FORMATS[self._recipe.format], self._skeleton.dtype, {}
        for name, (codes, grid) in solved.items():
            path = self._skeleton.linear_name(index, name)
            packed = container.pack(codes, grid, dtype, self._schemes[path])
            found |= {f"{path}.{suffix}": tensor.cpu() for suffix, tensor in packed.items()}
        stored = read_named(self._located(index), found)
        return {name: tensor for name, tensor in found.items() if not torch.equal(tensor, stored[name])}

    def _located(self, index: int) -> Mapping[str, TensorInfo]:
        return self._journal.locate_block_tensors(index)

"""The new weights of blocks that are committed, read from what the journal holds of them."""

from collections.abc import Mapping
from functools import cached_property

from torch import Tensor, nn

from leangrid.formats import FORMATS
from leangrid.models.linears import rows_first
from leangrid.models.skeleton import Skeleton
from leangrid.planning.sizes import stored_schemes
from leangrid.recipe import Recipe
from leangrid.schemes import Scheme
from leangrid.storage.journal import Journal
from leangrid.storage.safetensors import read_named


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
        container, schemes = FORMATS[self._recipe.format], self._schemes
        infos, found, dtype = self._journal.locate_block_tensors(index), {}, self._skeleton.dtype
        for name in (name for group in self._skeleton.groups(index) for name in group):
            path = self._skeleton.linear_name(index, name)
            shape = self._skeleton.shape(path)
            names = {suffix: f"{path}.{suffix}" for suffix in container.layout(schemes[path], shape, dtype)}
            stored = read_named(infos, names.values())
            tensors = {suffix: stored[full] for suffix, full in names.items()}
            codes, grid = container.unpack(tensors, schemes[path], shape, path)
            module = block.get_submodule(name)
            parameter = module.get_parameter("weight")
            weight = container.dequantize(codes, grid, dtype).to(parameter.device, parameter.dtype)
            found[name] = rows_first(module, weight).contiguous()
        return found

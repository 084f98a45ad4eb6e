"""The linears of a model that are quantized: by their names in the result, their paths in the model and their shapes.

A mixture of experts has tens of thousands, whose shapes its form knows."""

from collections.abc import Callable, Sequence

from torch import nn

from leangrid.models.discovery import Structure
from leangrid.models.experts import experts_of_group
from leangrid.models.linears import is_transposed, linear_shape

LinearShape = tuple[tuple[int, int], str]  # (rows, cols), and "linear", or "conv1d" for a transposed weight


def shape_of(linear: nn.Module) -> LinearShape:
    """The shape of a module."""
    return linear_shape(linear), "conv1d" if is_transposed(linear) else "linear"


def name_linears(
    structure: Structure, blocks: Sequence[nn.Module], name_of: Callable[[str], str]
) -> tuple[dict[str, str], dict[str, LinearShape]]:
    """Paths and shapes by names, block after block in the order of the groups.

    Args:
        structure: what was found, or chosen, of the model.
        blocks: its modules.
        name_of: the name that the result gives to the linear at a path in the model.
    """
    paths, shapes = dict[str, str](), dict[str, LinearShape]()
    for block, module in zip(structure.blocks, blocks, strict=True):
        for group in block.groups:
            mixture = experts_of_group(module, group)
            form = None if mixture is None else mixture[1].form
            leaves = {} if form is None else {leaf: (form.shape(leaf), "linear") for leaf in form.leaves}
            for inner in group:
                name = name_of(path := f"{block.path}.{inner}")
                paths[name] = path
                shapes[name] = leaves[path[path.rfind(".") + 1 :]] if leaves else shape_of(module.get_submodule(inner))
    return paths, shapes

"""Bytes before and after, from shapes alone: for the plan, for the check of the disk, and for what a result reports."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from leangrid.formats import FORMATS, schemes_stored_by
from leangrid.models.skeleton import Skeleton
from leangrid.recipe import Recipe, Scheme

GATE_WINDOWS, GATE_LENGTH = 2, 256  # calibration windows that the quality gate takes, and tokens of one


@dataclass(frozen=True)
class LayerSize:
    """One linear: [rows, cols], its bytes before and after (codes and grid), and the scheme it gets."""

    name: str
    rows: int
    cols: int
    bytes_before: int
    bytes_after: int
    scheme: str = ""


@dataclass(frozen=True)
class Sizes:
    """All linears that are quantized, and the bytes of the whole checkpoint before and after."""

    layers: list[LayerSize]
    bytes_before: int
    bytes_after: int

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of the quantized linears over their weights."""
        return (
            8 * sum(layer.bytes_after for layer in self.layers) / sum(layer.rows * layer.cols for layer in self.layers)
        )


def stored_schemes(skeleton: Skeleton, recipe: Recipe) -> dict[str, Scheme]:
    """Layer -> the scheme that the files of a resolved ``recipe`` will say, in the model's order."""
    names = skeleton.all_linear_names()
    return schemes_stored_by(
        FORMATS[recipe.format], {name: (recipe.for_layer(name).parsed, skeleton.shape(name)[1]) for name in names}
    )


def compute_sizes(skeleton: Skeleton, recipe: Recipe) -> Sizes:
    """The sizes that quantizing ``skeleton`` by a resolved ``recipe`` gives."""
    layers, schemes = [], stored_schemes(skeleton, recipe)
    for name in skeleton.all_linear_names():
        rows, cols = skeleton.shape(name)
        stored = FORMATS[recipe.format].layout(schemes[name], (rows, cols), skeleton.dtype).values()
        after = sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in stored)
        layers.append(
            LayerSize(
                name,
                rows,
                cols,
                rows * cols * skeleton.dtype.itemsize,
                after,
                recipe.for_layer(name).scheme_name(cols),
            )
        )
    before = sum(tensor.nbytes for tensor in skeleton.checkpoint.tensors.values())
    return Sizes(layers, before, before + sum(layer.bytes_after - layer.bytes_before for layer in layers))


def state_bytes(skeleton: Skeleton, recipe: Recipe, tokens: int) -> int:
    """The hidden states of all ``tokens`` between two blocks: two streams where the input's error is corrected."""
    return recipe.streams * tokens * skeleton.hidden_size * skeleton.compute_dtype.itemsize


class DiskBytes(NamedTuple):
    """What a run needs on disk at most, where the result is made and where hidden states wait (often one disk)."""

    result: int
    states: int


def disk_bytes(skeleton: Skeleton, recipe: Recipe, tokens: int, mapped: bool = False) -> DiskBytes:
    """The journal's blocks and the finished shards beside them; two sets of states, and two more (those that enter a
    block and those that leave it) where they are worked on in ``mapped`` files."""
    return DiskBytes(
        2 * compute_sizes(skeleton, recipe).bytes_after, (4 if mapped else 2) * state_bytes(skeleton, recipe, tokens)
    )

"""Bytes before and after, from shapes alone: for the plan, for the check of the disk, and for what a result reports."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from leangrid.formats import FORMATS, schemes_stored_by
from leangrid.models.skeleton import Skeleton
from leangrid.recipe import Recipe
from leangrid.schemes import Scheme

GATE_WINDOWS, GATE_LENGTH = 2, 256  # calibration windows that the quality gate takes, and tokens of one


@dataclass(frozen=True, slots=True)
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


@dataclass(frozen=True)
class Alike:
    """Layers of one scheme, shape and kind: what holds of one of them holds of all.

    Attributes:
        names: in the model's order.
        scheme: that a recipe asks for.
        kind: as ``Skeleton.layer_kind`` says.
    """

    names: list[str]
    scheme: Scheme
    rows: int
    cols: int
    kind: str


def layers_alike(skeleton: Skeleton, recipe: Recipe) -> list[Alike]:
    """All layers by what decides their sizes, those with the earliest first; ``recipe`` is resolved. A mixture of
    experts has tens of thousands of layers, of two or three kinds."""
    if not recipe.layers:
        return [Alike(names, recipe.parsed, *shape, kind) for (shape, kind), names in skeleton.names_by_shape.items()]
    found: dict[tuple[str | None, tuple[tuple[int, int], str]], Alike] = {}
    for name, both in skeleton.shapes.items():
        key = recipe.find_key(name)
        if (alike := found.get((key, both))) is None:
            alike = found[key, both] = Alike([], recipe.for_layer(name).parsed, *both[0], both[1])
        alike.names.append(name)
    return list(found.values())


def stored_schemes(skeleton: Skeleton, recipe: Recipe) -> dict[str, Scheme]:
    """Layer -> the scheme that the files of a resolved ``recipe`` will say, in the model's order."""
    return by_name(skeleton, stored_kinds(skeleton, recipe))


def by_name(skeleton: Skeleton, kinds: Iterable[tuple[Alike, Scheme]]) -> dict[str, Scheme]:
    """Layer -> scheme, in the model's order."""
    found: dict[str, Any] = dict.fromkeys(skeleton.shapes)
    for alike, scheme in kinds:
        found.update(dict.fromkeys(alike.names, scheme))
    return found


def stored_kinds(skeleton: Skeleton, recipe: Recipe) -> list[tuple[Alike, Scheme]]:
    """What ``layers_alike`` gives, each with the scheme that the files will say."""
    kinds = layers_alike(skeleton, recipe)
    firsts = {alike.names[0]: (alike.scheme, alike.cols) for alike in kinds}
    stored = schemes_stored_by(FORMATS[recipe.format], firsts)
    return [(alike, stored[alike.names[0]]) for alike in kinds]


def compute_sizes(skeleton: Skeleton, recipe: Recipe) -> Sizes:
    """The sizes that quantizing ``skeleton`` by a resolved ``recipe`` gives."""
    sizes = dict[str, LayerSize]()
    for alike, stored in stored_kinds(skeleton, recipe):
        shape = (alike.rows, alike.cols)
        layout = FORMATS[recipe.format].layout(stored, shape, skeleton.dtype).values()
        before = alike.rows * alike.cols * skeleton.dtype.itemsize
        after = sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in layout)
        scheme = alike.scheme.fitting(alike.cols).name
        sizes |= {name: LayerSize(name, *shape, before, after, scheme) for name in alike.names}
    whole = sum(tensor.nbytes for tensor in skeleton.checkpoint.tensors.values())
    layers = [sizes[name] for name in skeleton.all_linear_names()]
    return Sizes(layers, whole, whole + sum(layer.bytes_after - layer.bytes_before for layer in layers))


def state_bytes(skeleton: Skeleton, recipe: Recipe, tokens: int) -> int:
    """The hidden states of all ``tokens`` between two blocks: two streams where the input's error is corrected."""
    return recipe.streams * tokens * skeleton.hidden_size * skeleton.compute_dtype.itemsize


class DiskBytes(NamedTuple):
    """What a run needs on disk at most, where the result is made and where hidden states wait (often one disk)."""

    result: int
    states: int


def guide_bytes(draws: int, tokens: int, hidden: int) -> int:
    """Bytes of what guides the tuning of one block (run/draw_guide.py)."""
    return draws * tokens * hidden * torch.bfloat16.itemsize


def disk_bytes(
    skeleton: Skeleton, recipe: Recipe, tokens: int, mapped: bool = False, sizes: Sizes | None = None
) -> DiskBytes:
    """The journal's blocks and the finished shards beside them; two sets of states.

    ``mapped``: the states are worked on in files, which makes two more sets (those that enter a block and those that
    leave it), and what guides tuning is in files too. ``sizes``: those that ``compute_sizes`` gives; None: they are
    computed."""
    sizes = compute_sizes(skeleton, recipe) if sizes is None else sizes
    drawn = len(skeleton.blocks) * guide_bytes(recipe.draws, tokens, skeleton.hidden_size) if mapped else 0
    return DiskBytes(2 * sizes.bytes_after, (4 if mapped else 2) * state_bytes(skeleton, recipe, tokens) + drawn)

"""A budget of bits or bytes: which linears have to share a scheme, which schemes they may have, and what these take.

Engines hold the linears of one module that read the same input (q, k, v; gate, up) in one matrix, and all experts of a
block: such a unit has one scheme. Its candidates are of one kind: the scheme that was asked for with the other numbers
of bits that the container stores, or llama.cpp's other block types."""

import math
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from leangrid.block_types import BLOCK_TYPES
from leangrid.errors import RecipeError
from leangrid.formats import FORMATS
from leangrid.models.experts import experts_of_group
from leangrid.models.skeleton import Skeleton
from leangrid.patterns import REGEX
from leangrid.planning.groups import groups_of
from leangrid.planning.sizes import compute_sizes, stored_schemes
from leangrid.recipe import Recipe
from leangrid.schemes import GRID_SCHEMES, Scheme
from leangrid.solve.knapsack import Option, spend, spend_roughly

_K_TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
_NARROW_TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
# What a directory holds beside tensors and the source's own files: headers, config, manifest, records and pages. On
# tiny models 61 kB with 14 linears, 93 kB with 35.
_FILES, _FILES_OF_LAYER = 1 << 16, 1 << 11

EXPERTS = 8  # of a mixture whose losses are measured; they stand for all
PROBED_WINDOWS, PROBED_LENGTH = 8, 256  # on which the distance of each unit is measured, at most
_LITTLE = 1 << 26  # bytes of their hidden states that are never too many
_LEAST_TOKENS, _TOKENS_OF_COLUMN = 8192, 4  # of the Hessians that losses are measured by


@dataclass(frozen=True)
class Unit:
    """Linears that share a scheme.

    Attributes:
        block: the number of their block.
        paths: from the block, in the order of the forward pass.
        names: in the result.
        weights: numbers in all of them.
        sizes: bytes of all of them by each candidate.
        experts: whether they are the experts of a mixture.
    """

    block: int
    paths: tuple[str, ...]
    names: tuple[str, ...]
    weights: int
    sizes: tuple[int, ...]
    experts: bool = False

    @property
    def tried(self) -> tuple[str, ...]:
        """As many of the ``names`` as losses are measured of."""
        leaves = len({name.rpartition(".")[2] for name in self.names})
        return self.names[: EXPERTS * leaves] if self.experts else self.names


@dataclass(frozen=True)
class Budget:
    """What may be chosen, and how much it may take.

    Attributes:
        recipe: resolved, with its budget.
        candidates: schemes of one kind, the one of fewest bits first.
        units: in the model's order.
        room: bytes that the quantized linears may take.
    """

    recipe: Recipe
    candidates: tuple[Scheme, ...]
    units: tuple[Unit, ...]
    room: int

    @classmethod
    def of(cls, skeleton: Skeleton, recipe: Recipe) -> "Budget":
        """The budget of a resolved ``recipe`` that has one, and that ``resolve.refuse_impossible`` let through.

        Raises:
            RecipeError: the scheme's kind cannot be mixed, a block is called more than once in a pass, or the budget is
                out of range, which is named.
            FormatError: the container stores one scheme for all layers.
        """
        order = skeleton.structure.order
        if len(set(order)) < len(order):
            again = next(index for index in order if order.count(index) > 1)
            what = "a budget needs to know what each block alone costs, but the model calls this one more than once"
            raise RecipeError(what, skeleton.block_name(again), "Use a scheme for all layers")
        plain = without_budget(recipe)
        candidates = _candidates(plain, skeleton)
        sizes = [compute_sizes(skeleton, plain.model_copy(update={"scheme": one.name})) for one in candidates]
        stored = [{layer.name: layer.bytes_after for layer in one.layers} for one in sizes]
        units = tuple(_units(skeleton, stored))
        weights = sum(unit.weights for unit in units)
        beside = sizes[0].bytes_after - sum(layer.bytes_after for layer in sizes[0].layers)
        beside += sum(file.stat().st_size for file in _side_files(skeleton))
        beside += _FILES + _FILES_OF_LAYER * (len(stored[0]) + len(skeleton.blocks))
        room = int(recipe.bits * weights / 8) if recipe.bits is not None else (recipe.size or 0) - beside
        found = cls(recipe, candidates, units, room)
        found._refuse_out_of_range(weights, beside)
        return found

    @property
    def least(self) -> int:
        """Bytes of all linears by the smallest of the candidates."""
        return sum(min(unit.sizes) for unit in self.units)

    @property
    def most(self) -> int:
        """Bytes of all linears by the largest of the candidates."""
        return sum(max(unit.sizes) for unit in self.units)

    def spread(self) -> Recipe:
        """A recipe within the budget, chosen by sizes alone: a weight of b bits is taken to cost 4^-b."""
        bits = [scheme.bits for scheme in self.candidates]
        losses = [[unit.weights * 4.0**-one for one in bits] for unit in self.units]
        return self.chosen(spend_roughly(self._items(losses), self.room))

    def choose(self, losses: Sequence[Sequence[float]]) -> list[int]:
        """Of each unit the number of its candidate, by the loss of each candidate of each unit: the least sum of losses
        that fits."""
        return spend(self._items(losses), self.room)

    def chosen(self, numbers: Sequence[int]) -> Recipe:
        """The recipe without a budget in which each unit has the candidate of this number: the one of most weights as
        ``scheme``, the others in ``layers``."""
        weights = [0] * len(self.candidates)
        for unit, number in zip(self.units, numbers, strict=True):
            weights[number] += unit.weights
        common = max(range(len(weights)), key=lambda number: weights[number])
        names = {name for unit in self.units for name in unit.names}
        ambiguous = names & _ends_of(names)
        layers = {
            key: self.candidates[number].name
            for unit, number in zip(self.units, numbers, strict=True)
            if number != common
            for key in _keys(unit, ambiguous)
        }
        update = {"scheme": self.candidates[common].name, "layers": layers}
        return without_budget(self.recipe).model_copy(update=update)

    def widths(self, numbers: Sequence[int]) -> dict[str, int]:
        """How many linears have each of the candidates that were chosen, by its name."""
        counts = dict.fromkeys((scheme.name for scheme in self.candidates), 0)
        for unit, number in zip(self.units, numbers, strict=True):
            counts[self.candidates[number].name] += len(unit.names)
        return {name: count for name, count in counts.items() if count}

    def to_json(self) -> dict[str, Any]:
        """For the plan: what was asked for, the candidates, how many units there are, and the range."""
        weights = sum(unit.weights for unit in self.units)
        return {
            **asked(self.recipe),
            "candidates": [scheme.name for scheme in self.candidates],
            "units": len(self.units),
            "bits_from": round(8 * self.least / weights, 4),
            "bits_to": round(8 * self.most / weights, 4),
        }

    def _items(self, losses: Sequence[Sequence[float]]) -> list[list[Option]]:
        pairs = zip(self.units, losses, strict=True)
        return [[Option(*each) for each in zip(unit.sizes, loss, strict=True)] for unit, loss in pairs]

    def _refuse_out_of_range(self, weights: int, beside: int) -> None:
        if self.least <= self.room <= self.most:
            return
        narrow, wide = self.candidates[0].name, self.candidates[-1].name
        how = "below the smallest" if self.room < self.least else "above the largest"
        if self.recipe.bits is not None:
            low, high = math.ceil(8000 * self.least / weights) / 1000, math.floor(8000 * self.most / weights) / 1000
            raise RecipeError(
                f"{self.recipe.bits:g} bits a weight are {how} scheme",
                "--bits",
                f"{narrow} to {wide} are {low:g} to {high:g} bits a weight, with scales and zero points",
            )
        raise RecipeError(
            f"{self.recipe.size:,} bytes are {how} scheme",
            "--size",
            f"{narrow} to {wide} are {self.least + beside:,} to {self.most + beside:,} bytes, with everything in the "
            "directory",
        )


def asked(recipe: Recipe) -> dict[str, Any]:
    """The budget as it was asked for: ``bits`` or ``size``."""
    return {"bits": recipe.bits} if recipe.bits is not None else {"size": recipe.size}


def without_budget(recipe: Recipe) -> Recipe:
    """The recipe with neither ``bits`` nor ``size``."""
    return recipe.model_copy(update={"bits": None, "size": None})


def estimated_recipe(recipe: Recipe, skeleton: Skeleton) -> Recipe:
    """The recipe by which sizes are computed before a run: a resolved one itself, or with a budget one that spends it
    evenly, since the real choice comes from data."""
    return Budget.of(skeleton, recipe).spread() if recipe.has_budget else recipe


def _candidates(recipe: Recipe, skeleton: Skeleton) -> tuple[Scheme, ...]:
    """The schemes that the layers of ``recipe`` (without a budget) may have, the one of fewest bits first."""
    scheme = Scheme.parse(recipe.scheme)
    if scheme.block is not None:
        types = _K_TYPES if scheme.block in _K_TYPES else _NARROW_TYPES
        found = [Scheme.of_block(BLOCK_TYPES[name], scheme.method) for name in types]
    elif GRID_SCHEMES[scheme.grid].mixes:
        found = [scheme.with_bits(bits) for bits in GRID_SCHEMES[scheme.grid].bits]
    else:
        what = f"a budget gives layers different bits, and {recipe.scheme} layers all have the same"
        raise RecipeError(what, "--scheme", "Use an affine scheme such as W4A16_G64, or a block type such as Q4_K")
    container = FORMATS[recipe.format]
    shapes = {(*shape, kind): names[0] for (shape, kind), names in skeleton.names_by_shape.items()}
    held = tuple(
        one
        for one in found
        if not any(container.refuse(one, name, rows, cols, kind) for (rows, cols, kind), name in shapes.items())
    )
    name = skeleton.all_linear_names()[0]
    several = {}
    for number, one in enumerate(found[:2]):
        uniform = recipe.model_copy(update={"scheme": one.name})
        several[f"{name}.{number}"] = stored_schemes(skeleton, uniform)[name] if one in held else one
    container.config(several, [])  # refuses where it stores one scheme only
    return held


def _units(skeleton: Skeleton, stored: Sequence[dict[str, int]]) -> Iterable[Unit]:
    """All units, block after block; ``stored`` has the bytes of each linear by each candidate."""
    for index, found in enumerate(skeleton.structure.blocks):
        units: list[list[str]] = []
        owners: dict[object, int] = {}
        mixtures: set[int] = set()
        for group in skeleton.groups(index):
            mixture = experts_of_group(skeleton.blocks[index], tuple(group))
            keys: set[object] = {mixture[0]} if mixture is not None else {
                (found.reads.get(path), path.rpartition(".")[0]) for path in group
            }  # fmt: skip
            number = next((owners[key] for key in keys if key in owners), len(units))
            if number == len(units):
                units.append([])
            units[number] += group
            owners |= dict.fromkeys(keys, number)
            if mixture is not None:
                mixtures.add(number)
        for number, paths in enumerate(units):
            names = tuple(skeleton.linear_name(index, path) for path in paths)
            weights = sum(math.prod(skeleton.shape(name)) for name in names)
            sizes = tuple(sum(one[name] for name in names) for one in stored)
            yield Unit(index, tuple(paths), names, weights, sizes, number in mixtures)


def _keys(unit: Unit, ambiguous: Collection[str]) -> list[str]:
    """What names the unit's linears, and no others, in a recipe's ``layers``: their names, with re: where another name
    ends in one (``ambiguous``); of experts one pattern for each linear of an expert."""
    parts = [name.split(".") for name in unit.names]
    if not unit.experts or len({len(each) for each in parts}) > 1:
        return [REGEX + re.escape(name) if name in ambiguous else name for name in unit.names]
    same = [len(set(each)) == 1 for each in zip(*parts, strict=True)]
    spelled = (
        [r"\d+" if one.isdigit() and not alike else re.escape(one) for one, alike in zip(each, same, strict=True)]
        for each in parts
    )
    return list(dict.fromkeys(REGEX + r"\.".join(each) for each in spelled))


def _ends_of(names: Iterable[str]) -> set[str]:
    """What stands behind any dot of any of ``names``."""
    return {name[at + 1 :] for name in names for at, letter in enumerate(name) if letter == "."}


def _side_files(skeleton: Skeleton) -> Iterable[Any]:
    """The files that a result copies from its source; none of a described model."""
    side_files = getattr(skeleton.checkpoint, "side_files", None)
    return [] if side_files is None else side_files().values()


def count_measured(skeleton: Skeleton, samples: int, length: int) -> int:
    """How many of ``samples`` windows of ``length`` tokens the losses of all widths are measured on: as many as the
    Hessian of the widest linear needs, of experts by the share of tokens that are routed to one."""
    groups = (group for index in range(len(skeleton.blocks)) for group in groups_of(skeleton, index))
    needed = max(group.cols * group.experts // group.copies for group in groups)
    tokens = max(_LEAST_TOKENS, _TOKENS_OF_COLUMN * needed)
    return min(samples, -(-tokens // length))


def count_probed(skeleton: Skeleton, budget: Budget, samples: int, length: int, measured: int) -> int:
    """How many windows, of at most ``PROBED_LENGTH`` tokens, each unit's distance from the original is measured on.

    There is a stream of hidden states for each unit: together with those of the ``measured`` windows they take no more
    memory than the run's own, if that leaves room for one window, or than a little."""
    own = samples * length * budget.recipe.streams - measured * length
    own = max(own, _LITTLE // (skeleton.hidden_size * skeleton.compute_dtype.itemsize))
    most = own // ((len(budget.units) + 1) * min(length, PROBED_LENGTH))
    return max(1, min(samples, PROBED_WINDOWS, most))

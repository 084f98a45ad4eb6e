"""What decides how much memory a run takes: shapes, tokens, and bytes of one number."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from leangrid import kernels
from leangrid.machine.arithmetic import choose_compute_dtype
from leangrid.machine.devices import has_own_memory
from leangrid.models.flow import flows_live
from leangrid.models.skeleton import Skeleton
from leangrid.planning.groups import Group, largest_groups
from leangrid.planning.sizes import guide_bytes
from leangrid.recipe import Recipe
from leangrid.schemes import Scheme

_F32 = 4
_NORM = 3  # float32 copies of a batch's hidden states inside a norm


@dataclass(frozen=True)
class Demand:
    """The numbers that decide the sums: shapes, tokens, bytes of one number."""

    groups: tuple[Group, ...]
    hidden: int
    vocabulary: int
    samples: int
    length: int
    streams: int
    itemsize: int  # of weights and hidden states as they are computed
    stored_itemsize: int
    packed: int  # bytes of a quantized block
    accelerated: bool
    schemes: tuple[Scheme, ...]
    refined: bool = True
    has_lm_head: bool = True  # the quality gate compares logits; of other models their states
    tiled: bool = False  # Hessians take 16-bit inputs as they are: no copy in float32
    plain: int = 0  # numbers of the block's linears that are not quantized
    live: bool = False  # whether the model's own forward is held at its blocks (models/flow.py)
    outside: int = 0  # bytes of the weights outside of the blocks, which stay loaded then
    tuned: bool = False
    measured: bool = False  # the share of the correction: one matrix more, its noise
    finished: int = 0  # numbers of all quantized linears of a model that is finished as a whole
    whole: int = 0  # bytes of the whole model as it is computed, where it is finished or guides tuning
    blocks: int = 1
    draws: int = 0  # gradients a token at each block's output that guide tuning

    @classmethod
    def of(cls, skeleton: Skeleton, recipe: Recipe, samples: int, length: int, device: str) -> "Demand":
        """Of a run of ``samples`` windows of ``length`` tokens on ``device``, by a resolved recipe."""
        groups = largest_groups(skeleton)
        vocabulary, hidden = skeleton.vocabulary, skeleton.hidden_size
        weights = sum(g.rows * g.cols for g in groups)
        itemsize = choose_compute_dtype(recipe.products, skeleton.dtype).itemsize
        bits = max(scheme.fitting(group.cols).bits for scheme in recipe.schemes for group in groups)
        numbers, whole, blocks = _whole(skeleton, itemsize) if recipe.finish or recipe.draws else (0, 0, 1)
        return cls(
            tuple(groups),
            hidden,
            vocabulary,
            samples,
            length,
            recipe.streams,
            itemsize,
            skeleton.dtype.itemsize,
            weights * (bits + 1) // 8,
            has_own_memory(device),
            tuple(recipe.schemes),
            bool(recipe.refine),
            skeleton.has_lm_head,
            kernels.outer_takes_bfloat16(device),
            max(_staying(skeleton)),
            flows_live(skeleton),
            itemsize * _outside(skeleton),
            bool(recipe.tune),
            recipe.measures_correction,
            numbers if recipe.finish else 0,
            whole,
            blocks,
            recipe.draws,
        )

    @property
    def tokens(self) -> int:
        return self.samples * self.length

    @property
    def weights(self) -> int:
        """Bytes of a block's linears."""
        return self.itemsize * (self.plain + sum(g.rows * g.cols for g in self.groups))

    @property
    def states(self) -> int:
        """Bytes of the hidden states of all streams between two blocks."""
        return self.streams * self.tokens * self.hidden * self.itemsize

    @property
    def guide(self) -> int:
        """Bytes of the gradients that guide tuning, of all blocks."""
        return self.blocks * guide_bytes(self.draws, self.tokens, self.hidden)

    def held(self, number: int) -> int:
        """Bytes a token that a pass holds while it stands at group ``number`` (at its end: what it gives out).

        Groups are the four of ``largest_groups``: into attention, out of it, into the MLP, out of it. A pass
        that stands at one holds the group's input, the norm's output or the states that led there, and past attention
        a new residual.
        """
        if number == len(self.groups):
            return self.itemsize * self.hidden
        group = self.groups[number]
        if number == 0:
            return self.itemsize * group.read
        before = self.groups[number - 1]
        if number == 1:  # turned by the rotary tables, queries and keys have the states' dtype again
            return self.itemsize * (before.read + before.made) + self.itemsize * group.read
        through = self.itemsize * (self.hidden + (group.read if number == 2 else before.read))
        return through if number == 2 else through + self.itemsize * group.read

    def transient(self, number: int, tokens: int) -> int:
        """Bytes that one batch of ``tokens`` needs for a moment on the way to group ``number``, beyond what it holds
        there."""
        norm = _NORM * self.hidden * _F32 if self.itemsize < _F32 else self.hidden * self.itemsize
        if number == 0:
            return tokens * norm
        made = self.groups[number - 1].made * self.itemsize
        return tokens * max(norm, made)


def _staying(skeleton: Skeleton) -> Iterator[int]:
    """The numbers of each block's linears that are not quantized."""
    for block in skeleton.structure.blocks:
        yield sum(prod(skeleton.shape_at(f"{block.path}.{path}")[0]) for path in block.kept)


def _outside(skeleton: Skeleton) -> int:
    """The numbers of the weights outside of the blocks that text reaches."""
    inside = f"{skeleton.entry_path}." if skeleton.entry_path else ""
    names = (name for name in skeleton.parameter_names() if name.startswith(inside))
    used = (name for name in names if not name.startswith(skeleton.block_prefixes))
    stored = (skeleton.stored.place(name).stored[0] for name in used if name not in skeleton.structure.unused)
    return sum(prod(skeleton.checkpoint.tensors[name].shape) for name in stored)


def _whole(skeleton: Skeleton, itemsize: int) -> tuple[int, int, int]:
    """Numbers of all quantized linears, bytes of the whole model with ``itemsize`` a number, and how many blocks."""
    numbers = sum(prod(skeleton.shape(name)) for name in skeleton.all_linear_names())
    staying = list(_staying(skeleton))
    return numbers, itemsize * (numbers + sum(staying) + _outside(skeleton)), len(staying)

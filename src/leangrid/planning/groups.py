"""What a group of linears costs by its shapes: columns, rows, experts. Of a mixture of experts each stage is one group,
whose experts are alike: what holds of one is multiplied."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from leangrid.models.experts import experts_of_group
from leangrid.models.skeleton import Skeleton

EXPERT_SUMS = 1 << 30  # bytes of experts' Hessians that are summed at once


@dataclass(frozen=True)
class Group:
    """Linears that read one input, or one stage of a mixture of experts.

    Attributes:
        cols: their columns.
        rows: of all of them.
        tallest: of the one with the most.
        unreached: those of ``rows`` that a token does not go through: of the experts that it is not routed to.
        experts: how many have a Hessian of their own; 1 where all read one input.
        copies: through how many of them a token goes.
    """

    cols: int
    rows: int
    tallest: int
    unreached: int = 0
    experts: int = 1
    copies: int = 1

    @property
    def made(self) -> int:
        """Numbers that the group makes of a token."""
        return self.rows - self.unreached

    @property
    def read(self) -> int:
        """Numbers that it reads of a token."""
        return self.cols * self.copies

    @property
    def sums(self) -> int:
        """Hessians of experts that are in memory at once, with the one that all of them share; 0 without experts."""
        if self.experts == 1:
            return 0
        return min(self.experts, max(1, EXPERT_SUMS // (4 * self.cols**2))) + 1


def groups_of(skeleton: Skeleton, index: int) -> list[Group]:
    """The groups of block ``index``, in the order of the forward pass."""
    return [_group(skeleton, index, names) for names in skeleton.groups(index)]


def largest_groups(skeleton: Skeleton) -> list[Group]:
    """The linears into attention, out of it, into the MLP and out of it as four groups, for the block with the most
    weights in linears.

    Blocks have other groups too (compressed queries, experts, recurrences): up to the first that gives hidden states
    all are counted as into attention, behind it each as into or out of the MLP."""
    blocks = [groups_of(skeleton, index) for index in range(len(skeleton.blocks))]
    sizes = [sum(group.rows * group.cols for group in groups) for groups in blocks]
    largest, hidden = sizes.index(max(sizes)), skeleton.hidden_size
    parts: list[list[Group]] = [[], [], [], []]
    for names, group in zip(skeleton.groups(largest), blocks[largest], strict=True):
        gives = group.tallest == hidden and group.rows == hidden * len(names)
        gives = gives and (len(names) == 1 or group.cols != hidden)
        parts[(3 if gives else 2) if parts[1] else (1 if gives else 0)].append(group)
    return [_together(part) for part in parts]


def _group(skeleton: Skeleton, index: int, names: Sequence[str]) -> Group:
    block = skeleton.block_name(index)
    mixture = experts_of_group(skeleton.blocks[index], tuple(names))
    if mixture is None:
        shapes = [skeleton.shape_at(f"{block}.{name}")[0] for name in names]
        return Group(shapes[0][1], sum(rows for rows, _ in shapes), max(rows for rows, _ in shapes))
    path, module, stage = mixture
    form, experts = module.form, len(module)
    shapes = [form.shape(leaf) for leaf in form.stages[stage]]
    rows = sum(rows for rows, _ in shapes)
    copies = min(experts, skeleton.structure.choices.get(f"{block}.{path}" if path else block, experts))
    tallest = max(rows for rows, _ in shapes)
    return Group(shapes[0][1], experts * rows, tallest, (experts - copies) * rows, experts, copies)


def _together(groups: Sequence[Group]) -> Group:
    """Several groups as one, as wide as the widest."""
    if not groups:
        return Group(1, 1, 1)
    widest = max(groups, key=lambda group: group.experts)
    rows, unreached = sum(group.rows for group in groups), sum(group.unreached for group in groups)
    cols, tallest = max(group.cols for group in groups), max(group.tallest for group in groups)
    return replace(widest, cols=cols, rows=rows, tallest=tallest, unreached=unreached)

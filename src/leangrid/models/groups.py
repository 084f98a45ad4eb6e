"""Groups of linears that read the same input, from what each linear of a block was seen to read (discovery.py), and
what they read in a walk (walk.py)."""

from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from leangrid.models.experts import Experts

Groups = tuple[tuple[str, ...], ...]
Places = tuple[tuple[int, ...], ...]  # where the inputs of a linear lie, one entry for each that is another


def group_by_input(
    reads: Mapping[str, Places], left_out: Container[str], mixtures: Mapping[str, Experts]
) -> tuple[Groups, frozenset[int]]:
    """The groups of a block.

    Args:
        reads: its linears, in the order of their first calls -> what each reads; of a mixture of experts nothing.
        left_out: linears, and mixtures by their own paths, that are in no group.
        mixtures: its mixtures of experts; all experts' linears of one stage are one group.

    Returns:
        The groups, each ending where another linear is called; and which of them, by number, are called more than
        once, on other inputs.
    """
    groups: list[tuple[str, ...]] = []
    repeated: set[int] = set()
    last: Places | None = None
    for name, places in reads.items():
        if name in left_out:
            continue
        if name in mixtures:
            groups += [mixtures[name].stage_paths(number, name) for number in range(mixtures[name].stages)]
            last = None
        elif last == places:
            groups[-1] += (name,)
        else:
            groups.append((name,))
            last = places
            if len(last) > 1:
                repeated.add(len(groups) - 1)
    return tuple(groups), frozenset(repeated)


@dataclass
class GroupInputs:
    """What the linears of one group read: iterating gives (original, quantized) a batch and call, [..., cols] each;
    ``numbered`` gives (batch, original, quantized).

    ``original`` is None with one stream (``paired`` False). A replayed group is computed as it is read, every time it
    is."""

    names: tuple[str, ...]
    paired: bool
    read: Callable[[], Iterator[tuple[int, Tensor | None, Tensor]]]

    def __iter__(self) -> Iterator[tuple[Tensor | None, Tensor]]:
        return ((theirs, ours) for _, theirs, ours in self.read())

    def numbered(self) -> Iterator[tuple[int, Tensor | None, Tensor]]:
        """With the number of the batch, which a group that is called several times reads several times."""
        return self.read()


@dataclass
class ExpertInputs:
    """What the experts' linears of one stage read: iterating gives, batch by batch, one tensor [tokens, cols] an
    expert.

    Which tokens an expert sees differs between the streams; these are the quantized stream's, as when the result is
    served.

    Attributes:
        names: all linears of the group, as for GroupInputs. experts: the same, an expert at a time.
    """

    names: tuple[str, ...]
    experts: tuple[tuple[str, ...], ...]
    read: Callable[[], Iterator[tuple[int, Any, Any]]]

    def __iter__(self) -> Iterator[list[Tensor]]:
        return (ours for _, _, ours in self.read())

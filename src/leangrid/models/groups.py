"""Groups of linears that read the same input, from what each linear of a block was seen to read (discovery.py)."""

from collections.abc import Container, Mapping

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
            dot = f"{name}." if name else ""
            for number in range(mixtures[name].stages):
                groups.append(tuple(f"{dot}{n}" for names in mixtures[name].stage(number) for n in names))
            last = None
        elif last == places:
            groups[-1] += (name,)
        else:
            groups.append((name,))
            last = places
            if len(last) > 1:
                repeated.add(len(groups) - 1)
    return tuple(groups), frozenset(repeated)

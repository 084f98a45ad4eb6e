"""Which numbers of which stored tensor are which of a tensor of the model, found by converting tensors whose elements
are numbered.

transformers converts tensors while it loads them (merged, cut, permuted, transposed; ``conversion.py``), by operations
that move numbers and change none. So where each number goes is seen by converting tensors that hold their own
positions, whatever the operations are. Axes that an operation leaves alone are cut short for that: a model's experts
are traced in a few megabytes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_SHORT = 6  # length of an axis that is cut short: halves, thirds and pairs of it are whole
_WHOLE = 1 << 16  # tensors with so few numbers together are traced uncut

Convert = Callable[[Sequence[Tensor]], Tensor]  # the stored tensors, in their order -> the model's
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Placement:
    """Where the numbers of one stored tensor lie in a tensor of the model.

    ``model[grid(at)] = stored.permute(order)[grid(taken)]``, where ``order`` are the axes of the stored tensor in the
    order of the model's, and an axis that only the model's tensor has (that of experts) is left out on the right.

    Attributes:
        stored: the name of the stored tensor.
        order: for each axis of the model's tensor the stored tensor's axis; None where it has none.
        at: for each axis of the model's tensor the indices that are filled, int64.
        taken: for each axis of the model's tensor the indices in the stored tensor's axis, as many as in ``at``; empty
            where it has none.
    """

    stored: str
    order: tuple[int | None, ...]
    at: tuple[Tensor, ...]
    taken: tuple[Tensor, ...]

    def put(self, stored: Tensor, into: Tensor) -> None:
        """Write what ``stored`` holds of the model's tensor ``into`` it."""
        kept = [axis for axis in self.order if axis is not None]
        part = stored.permute(*kept)
        for axis, indices in enumerate(indices for indices in self.taken if len(indices)):
            part = part.index_select(axis, indices)
        into[torch.meshgrid(*self.at, indexing="ij")] = part.reshape([len(indices) for indices in self.at])


def trace(
    convert: Convert, names: Sequence[str], shapes: Sequence[Shape], shape: Shape
) -> tuple[Placement, ...] | None:
    """Where the numbers of the stored tensors ``names`` of ``shapes`` lie in the tensor of ``shape`` that ``convert``
    makes of them; None where that is no grid of whole rows and columns, as where axes are merged or numbers
    computed."""
    axes = {len(one) for one in shapes}
    if len(axes) != 1:
        return None
    (count,) = axes
    if sum(_product(one) for one in shapes) <= _WHOLE:
        return _checked(_probe(convert, names, shapes), shape)
    # The rows with all other axes cut short, then, if the conversion does not leave them alone, the other axes.
    probed: dict[int, tuple[Placement, ...]] = {}
    for axis in dict.fromkeys((max(count - 2, 0), *reversed(range(count)))):
        cut = [tuple(n if i == axis else min(n, _SHORT) for i, n in enumerate(one)) for one in shapes]
        found = _probe(convert, names, cut)
        if found is not None:
            probed[axis] = found
            whole = _whole(probed, dict(zip(names, shapes, strict=True)), shape)
            if whole is not None:
                return _checked(whole, shape)
    return None


def _checked(found: tuple[Placement, ...] | None, shape: Shape) -> tuple[Placement, ...] | None:
    """``found``, or None where it does not fill a tensor of ``shape``."""
    if found is None:
        return None
    inside = all(
        len(one.at) == len(shape)
        and all(not len(indices) or int(indices.max()) < n for indices, n in zip(one.at, shape, strict=True))
        for one in found
    )
    filled = sum(_product([len(indices) for indices in one.at]) for one in found)
    return found if inside and filled == _product(shape) else None


def _whole(
    probed: dict[int, tuple[Placement, ...]], shapes: dict[str, Shape], shape: Shape
) -> tuple[Placement, ...] | None:
    """Placements in whole tensors from those in tensors of which only one axis, the key, was left whole: an axis that
    no probe has whole must be left alone by the conversion. None where it is not, or the probes differ."""
    first = next(iter(probed.values()))
    joined = []
    for index, one in enumerate(first):
        at, taken = list(one.at), list(one.taken)
        for d, axis in enumerate(one.order):
            if axis is None:
                continue
            length = shapes[one.stored][axis]
            if axis in probed:
                if len(probed[axis]) != len(first):
                    return None
                other = probed[axis][index]
                if (other.stored, other.order) != (one.stored, one.order):
                    return None
                at[d], taken[d] = other.at[d], other.taken[d]
            elif length > _SHORT:
                kept = torch.arange(_SHORT)
                if shape[d] != length or not (torch.equal(taken[d], kept) and torch.equal(at[d], kept)):
                    return None
                at[d] = taken[d] = torch.arange(length)
        joined.append(replace(one, at=tuple(at), taken=tuple(taken)))
    return tuple(joined)


def _probe(convert: Convert, names: Sequence[str], shapes: Sequence[Shape]) -> tuple[Placement, ...] | None:
    """The placements for tensors of these shapes, by numbering every element; None where they are no grids."""
    starts = [0]
    for one in shapes:
        starts.append(starts[-1] + _product(one))
    numbered = [
        torch.arange(first, first + _product(one), dtype=torch.int32).reshape(one)
        for first, one in zip(starts[:-1], shapes, strict=True)
    ]
    try:
        out = convert(numbered).contiguous()
    except (RuntimeError, ValueError, IndexError, TypeError):  # an operation that does not take axes cut short
        return None
    if out.dtype != torch.int32 or not out.numel() or int(out.min()) < 0 or int(out.max()) >= starts[-1]:
        return None  # numbers were computed, not moved
    if len(shapes) == 1 or out.ndim < 3:
        placed = _placed(out, starts, shapes, names)
        return None if placed is None else tuple(placed[index] for index in sorted(placed))
    merged: dict[int, list[Placement]] = {}
    tensor_at = {start: index for index, start in reversed(list(enumerate(starts)))}
    pattern = _placed(out[:1], starts, shapes, names)  # that of the first expert
    for at in range(len(out)):
        # Experts are all alike: the next one's numbers are the first one's, moved by as many tensors as one has.
        moved = _moved(out[:1], out[at : at + 1], tensor_at, shapes)
        if moved is None or pattern is None:
            placed = _placed(out[at : at + 1], starts, shapes, names)
        else:
            placed = {index + moved: one for index, one in pattern.items()}
        if placed is None:
            return None
        for index, one in placed.items():
            there = (torch.full_like(one.at[0], at), *one.at[1:])
            merged.setdefault(index, []).append(replace(one, stored=names[index], at=there))
    joined = [_stacked(merged[index]) for index in sorted(merged)]
    return None if any(one is None for one in joined) else tuple(one for one in joined if one is not None)


def _placed(
    piece: Tensor, starts: Sequence[int], shapes: Sequence[Shape], names: Sequence[str]
) -> dict[int, Placement] | None:
    """The placements in ``piece``, whose elements are numbered, by the index of the stored tensor."""
    sources = torch.bucketize(piece, torch.tensor(starts[1:], dtype=torch.int32), right=True)
    found: dict[int, Placement] = {}
    for index in map(int, sources.unique()):
        grid = _grid(sources == index)
        if grid is None:
            return None
        axes = _axes(piece[torch.meshgrid(*grid, indexing="ij")] - starts[index], shapes[index])
        if axes is None:
            return None
        found[index] = Placement(names[index], axes[0], grid, axes[1])
    return found


def _moved(first: Tensor, piece: Tensor, tensor_at: Mapping[int, int], shapes: Sequence[Shape]) -> int | None:
    """By how many stored tensors the numbers of ``piece`` are those of ``first`` moved, where each of these tensors has
    the shape of its counterpart and all numbers are of whole tensors; None where they are not. ``tensor_at``: the first
    number of each stored tensor -> which one it is."""
    low, high = int(first.min()), int(first.max()) + 1
    start = int(piece.min())
    one, end, other = tensor_at.get(low), tensor_at.get(high), tensor_at.get(start)
    if one is None or end is None or other is None or not torch.equal(piece - (start - low), first):
        return None
    return other - one if list(shapes[one:end]) == list(shapes[other : other + end - one]) else None


def _grid(mask: Tensor) -> tuple[Tensor, ...] | None:
    """The indices along each axis of a grid in which ``mask`` is true; None where it is no grid."""
    axes = range(mask.ndim)
    indices = tuple(
        (mask.any(dim=[other for other in axes if other != axis]) if mask.ndim > 1 else mask).nonzero().flatten()
        for axis in axes
    )
    return indices if _product([len(one) for one in indices]) == int(mask.sum()) else None


def _axes(local: Tensor, shape: Shape) -> tuple[tuple[int | None, ...], tuple[Tensor, ...]] | None:
    """For each axis of ``local``, which holds positions in a tensor of ``shape``: the axis of that tensor along which
    it runs, and the indices there. None where an axis runs along two."""
    order: list[int | None] = [None] * local.ndim
    taken = [torch.empty(0, dtype=torch.int64) for _ in range(local.ndim)]
    constant: list[tuple[int, Tensor]] = []
    for axis, size in enumerate(shape):
        along = (local // _product(shape[axis + 1 :])) % size
        runs = [d for d in range(local.ndim) if local.shape[d] > 1 and not torch.equal(*_ends(along, d))]
        if len(runs) > 1 or (runs and order[runs[0]] is not None):
            return None
        profile = along[tuple(slice(None) if d in runs else 0 for d in range(local.ndim))].reshape(-1).long()
        if not runs:
            constant.append((axis, profile[:1]))
            continue
        if not bool((along == profile.view([-1 if d in runs else 1 for d in range(local.ndim)])).all()):
            return None
        order[runs[0]], taken[runs[0]] = axis, profile
    free = [d for d in range(local.ndim) if order[d] is None and local.shape[d] == 1]
    # An axis of length one: the first of the model's axes of that length, those of experts (the first) last.
    for axis, index in reversed(constant):
        if not free:
            return None
        d = free.pop()
        order[d], taken[d] = axis, index
    if any(order[d] is None and local.shape[d] > 1 for d in range(local.ndim)):
        return None
    return tuple(order), tuple(taken)


def _ends(along: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """``along`` without its last and without its first index of ``axis``: equal where it does not change there."""
    length = along.shape[axis] - 1
    return along.narrow(axis, 0, length), along.narrow(axis, 1, length)


def _stacked(parts: list[Placement]) -> Placement | None:
    """Placements of one stored tensor at several indices of the first axis, as one; None where they differ beyond."""
    first = parts[0]
    if len(parts) == 1:
        return first
    same = all(
        one.order == first.order
        and all(torch.equal(a, b) for a, b in zip(one.at[1:], first.at[1:], strict=True))
        and all(torch.equal(a, b) for a, b in zip(one.taken[1:], first.taken[1:], strict=True))
        for one in parts
    )
    if not same or first.order[0] is None:
        return None
    at = torch.cat([one.at[0] for one in parts])
    taken = torch.cat([one.taken[0] for one in parts])
    return replace(first, at=(at, *first.at[1:]), taken=(taken, *first.taken[1:]))


def _product(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()

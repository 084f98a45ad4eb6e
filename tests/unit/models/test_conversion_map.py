"""Where numbers go in a conversion, found by converting numbered tensors: against the conversion of real ones, whole
and with axes cut short."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from leangrid.models import conversion_map
from leangrid.models.conversion_map import Convert, Shape, trace

EXPERTS, ROWS, COLS = 3, 24, 40


def _merged(tensors: Sequence[Tensor]) -> Tensor:
    """[experts, 2 x rows, cols] of gate and up of each expert, as transformers merges them."""
    return torch.cat([torch.stack(list(tensors[::2])), torch.stack(list(tensors[1::2]))], dim=1)


def _rotary(tensors: Sequence[Tensor]) -> Tensor:
    """Rows of four heads from pairs to halves."""
    return tensors[0].reshape(4, -1, 2, tensors[0].shape[1]).transpose(1, 2).reshape(tensors[0].shape)


def _pairs(tensors: Sequence[Tensor]) -> Tensor:
    """Rows of every expert from gate and up in turn to gate before up."""
    return torch.cat([tensors[0][:, ::2], tensors[0][:, 1::2]], dim=1)


CASES: dict[str, tuple[Convert, list[Shape], Shape]] = {
    "one after the other": (lambda t: torch.cat(list(t)), [(8, COLS), (16, COLS), (4, COLS)], (28, COLS)),
    "the second third": (lambda t: t[0].chunk(3)[1], [(3 * ROWS, COLS)], (ROWS, COLS)),
    "a bias's second third": (lambda t: t[0].chunk(3)[1], [(3 * ROWS,)], (ROWS,)),
    "transposed": (lambda t: t[0].T, [(ROWS, COLS)], (COLS, ROWS)),
    "rotary pairs": (_rotary, [(ROWS, COLS)], (ROWS, COLS)),
    "merged experts": (_merged, [(ROWS, COLS)] * 2 * EXPERTS, (EXPERTS, 2 * ROWS, COLS)),
    "merged experts of one column": (_merged, [(ROWS, 1)] * 2 * EXPERTS, (EXPERTS, 2 * ROWS, 1)),
    "merged experts, transposed": (
        lambda t: torch.stack([one.T for one in t]),
        [(ROWS, COLS)] * EXPERTS,
        (EXPERTS, COLS, ROWS),
    ),
    "all experts at once, in pairs": (_pairs, [(EXPERTS, ROWS, COLS)], (EXPERTS, ROWS, COLS)),
    "all experts at once, transposed": (
        lambda t: t[0].transpose(1, 2),
        [(EXPERTS, ROWS, COLS)],
        (EXPERTS, COLS, ROWS),
    ),
    "gate and up of all experts": (
        lambda t: torch.cat(list(t), dim=1),
        [(EXPERTS, ROWS, COLS)] * 2,
        (EXPERTS, 2 * ROWS, COLS),
    ),
    "more experts than a cut leaves": (_pairs, [(9, ROWS, COLS)], (9, ROWS, COLS)),
    "convolutions": (lambda t: torch.cat(list(t)), [(ROWS, 1, 4)] * 3, (3 * ROWS, 1, 4)),
}


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "cut short"])
@pytest.mark.parametrize("case", CASES)
def test_placements_rebuild_what_the_conversion_makes(case: str, whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion_map, "_WHOLE", 1 << 16 if whole else 0)
    convert, shapes, shape = CASES[case]
    names = [f"t{i}" for i in range(len(shapes))]
    placed = trace(convert, names, shapes, shape)
    assert placed is not None and {one.stored for one in placed} <= set(names)
    tensors = [torch.randn(one) for one in shapes]
    rebuilt = torch.full(shape, float("nan"))
    for one in placed:
        one.put(tensors[names.index(one.stored)], rebuilt)
    assert torch.equal(rebuilt, convert(tensors))


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "cut short"])
@pytest.mark.parametrize(
    ("convert", "shapes", "shape"),
    [
        (lambda t: t[0].reshape(ROWS, -1), [(ROWS, 2, COLS)], (ROWS, 2 * COLS)),  # axes merged
        (lambda t: t[0] + 1, [(ROWS, COLS)], (ROWS, COLS)),
        (lambda t: -t[0], [(ROWS, COLS)], (ROWS, COLS)),
        (lambda t: t[0] / 2, [(ROWS, COLS)], (ROWS, COLS)),
        (lambda t: torch.cat([t[0], t[0]]), [(ROWS, COLS)], (3 * ROWS, COLS)),  # not filled
        (lambda t: t[0] @ t[1], [(ROWS, COLS), (COLS,)], (ROWS,)),
    ],
)
def test_what_moves_no_whole_rows_has_no_placements(
    convert: Convert, shapes: list[Shape], shape: Shape, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion_map, "_WHOLE", 1 << 16 if whole else 0)
    assert trace(convert, [str(i) for i in range(len(shapes))], shapes, shape) is None


def test_permuted_columns_are_not_taken_for_columns_left_alone() -> None:
    """Cut to six columns, even and odd ones in turn are still seen to move; the placements are those of all 4096."""
    shape = (2048, 4096)
    placed = trace(lambda t: torch.cat([t[0][:, ::2], t[0][:, 1::2]], dim=1), ["w"], [shape], shape)
    assert placed is not None and placed[0].taken[1][:3].tolist() == [0, 2, 4]
    assert torch.equal(placed[0].at[0], placed[0].taken[0])

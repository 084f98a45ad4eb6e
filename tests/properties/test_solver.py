"""The blocked float32 sweep against the literal float64 one: the same codes for every shape, group and block."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from math_problems import grid, layer
from reference import reference_sweep
from torch import Tensor

from leangrid.grids import Grid
from leangrid.solve.factor import Factor
from leangrid.solve.sweep import Swept, sweep

TIE = 1e-4  # in units of the row's range: float32 may decide a tie closer than this the other way


def largest_excess(w: Tensor, factor: Factor, levels: Tensor, swept: Swept) -> tuple[Tensor, Tensor]:
    """Replay the codes in float64: how much farther than the nearest level each row's worst choice was, and its closest
    call."""
    current, inverse = w.double().clone(), torch.linalg.inv(factor.damped.double())
    values = (levels if levels.ndim == 3 else levels[:, None]).double()
    values = values.repeat_interleave(w.shape[1] // values.shape[1], dim=1)
    excess, margin = torch.zeros(len(w)).double(), torch.full((len(w),), float("inf")).double()
    for j in factor.order.tolist():
        distance = (values[:, j] - current[:, j, None]).abs()
        chosen = distance.gather(1, swept.codes[:, j, None].long())[:, 0]
        near = distance.sort(1).values
        excess, margin = torch.maximum(excess, chosen - near[:, 0]), torch.minimum(margin, near[:, 1] - near[:, 0])
        error = current[:, j] - values[:, j].gather(1, swept.codes[:, j, None].long())[:, 0]
        current -= torch.outer(error / inverse[j, j], inverse[j])
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return excess, margin


def check(w: Tensor, factor: Factor, found: Grid, block: int) -> None:
    with patch("leangrid.solve.sweep.BLOCK", block):
        fast = sweep(w, factor, found)
    literal = reference_sweep(w, factor.damped, found.levels, factor.order)
    span = (w.amax(1) - w.amin(1)).double()
    excess, margin = largest_excess(w, factor, found.levels, fast)
    assert bool((excess <= TIE * span).all())  # every choice is the nearest level, up to a tie
    decided = margin > TIE * span
    assert torch.equal(fast.codes[decided], literal.codes[decided])
    torch.testing.assert_close(fast.loss[decided], literal.loss[decided], rtol=1e-3, atol=1e-12)


@pytest.mark.fault("N10")
@given(
    rows=st.integers(1, 5),
    groups=st.integers(1, 4),
    group_size=st.integers(1, 12),
    bits=st.sampled_from([2, 3, 4]),
    kind=st.sampled_from(["minmax", "levels"]),
    block=st.integers(1, 50),
    seed=st.integers(0, 9999),
)
def test_every_shape_and_block(
    rows: int, groups: int, group_size: int, bits: int, kind: str, block: int, seed: int
) -> None:
    w, _, factor = layer(rows, groups * group_size, seed)
    check(w, factor, grid(kind, w, bits, group_size if kind == "minmax" else None), block)


@given(seed=st.integers(0, 99))
def test_most_rows_have_no_tie_at_all(seed: int) -> None:
    w, _, factor = layer(20, 40, seed)
    found = grid("minmax", w, 4, 8)
    literal = reference_sweep(w, factor.damped, found.levels, factor.order)
    assert int((sweep(w, factor, found).codes == literal.codes).all(1).sum()) >= 18


@pytest.mark.fault("N10")
def test_every_block_size_of_one_layer() -> None:
    w, _, factor = layer(3, 37, 1)
    for block in range(1, 39):
        check(w, factor, grid("minmax", w, 3, 37), block)


@pytest.mark.fault("N10")
def test_ragged_tail_after_full_blocks() -> None:
    w, _, factor = layer(4, 261, 2)
    check(w, factor, grid("minmax", w, 3, 9), 128)

"""LeanQuant-Exact against a literal OBQ that inverts the remaining submatrix at every step."""

import pytest
import torch

from leangrid import exact
from leangrid.exact import exact_sweep
from leangrid.reference import reference_obq
from math_problems import grid, layer, losses

KINDS = [("minmax", None), ("minmax", 5), ("levels", None)]


@pytest.mark.parametrize(("kind", "group_size"), KINDS)
@pytest.mark.parametrize("cols", [5, 20, 40])  # 40: columns that are done are dropped twice
@pytest.mark.parametrize("bits", [2, 4])
def test_codes_and_loss_equal_the_literal_algorithm(kind: str, group_size: int | None, cols: int, bits: int) -> None:
    w, _, factor = layer(4, cols, seed=cols)
    found = grid(kind, w, bits, group_size)
    fast, literal = exact_sweep(w, factor, found), reference_obq(w, factor.damped, found.levels)
    assert torch.equal(fast.codes, literal.codes)
    torch.testing.assert_close(fast.loss, literal.loss, rtol=1e-4, atol=0)
    torch.testing.assert_close(fast.loss, losses(found.dequantize(fast.codes), w, factor.damped), rtol=1e-4, atol=0)


def test_bounded_memory_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    w, _, factor = layer(7, 30)
    found = grid("minmax", w, 3, 10)
    whole = exact_sweep(w, factor, found)
    monkeypatch.setattr(exact, "_CHUNK_BYTES", 2 * 30 * 30 * 8)
    assert torch.equal(exact_sweep(w, factor, found).codes, whole.codes)


def test_float32_comes_close() -> None:
    w, _, factor = layer(6, 60)
    found = grid("levels", w, 4)
    single, double = exact_sweep(w, factor, found, torch.float32), exact_sweep(w, factor, found)
    assert float(single.loss.sum()) == pytest.approx(float(double.loss.sum()), rel=0.05)
    torch.testing.assert_close(single.loss, losses(found.dequantize(single.codes), w, factor.damped), rtol=1e-3, atol=0)

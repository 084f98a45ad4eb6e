"""LeanQuant-Exact against a literal OBQ that inverts the remaining submatrix at every step."""

import pytest
import torch
from math_problems import grid, layer, losses
from reference import reference_obq

from leangrid import kernels
from leangrid.errors import ShapeError
from leangrid.grids import OffsetGrid
from leangrid.kernels.plain import exact
from leangrid.solve.sweep import exact_sweep

KINDS = [("minmax", None), ("minmax", 5), ("levels", None)]


@pytest.mark.parametrize(("kind", "group_size"), KINDS)
@pytest.mark.parametrize("cols", [5, 20, 40])  # 40: columns that are done are dropped twice in torch, once in C++
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("path", ["torch", ""])
def test_codes_and_loss_equal_the_literal_algorithm(
    kind: str, group_size: int | None, cols: int, bits: int, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path:
        monkeypatch.setenv("LEANGRID_KERNELS", path)
    w, _, factor = layer(4, cols, seed=cols)
    found = grid(kind, w, bits, group_size)
    fast, literal = exact_sweep(w, factor, found), reference_obq(w, factor.damped, found.levels)
    assert torch.equal(fast.codes, literal.codes)
    torch.testing.assert_close(fast.loss, literal.loss, rtol=1e-4, atol=0)
    torch.testing.assert_close(fast.loss, losses(found.dequantize(fast.codes), w, factor.damped), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "cols", [1, 15, 33, 130, 200]
)  # one batch and less, whole tiles and parts of one, several compactions
@pytest.mark.parametrize("kind", ["levels", "minmax", "offset"])
@pytest.mark.parametrize("bits", [1, 3, 4])
def test_native_codes_are_those_of_torch(
    isa: str, cols: int, kind: str, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    w, _, factor = layer(9, cols, seed=cols)
    found = grid("minmax" if kind == "offset" else kind, w, bits, None)
    if kind == "offset":
        found = OffsetGrid(found.scale, -found.scale * found.zero.float() * 0.9, found.bits, found.group_size)
    native = exact_sweep(w, factor, found)
    monkeypatch.setenv("LEANGRID_KERNELS", "torch")
    twin = exact_sweep(w, factor, found)
    assert torch.equal(native.codes, twin.codes)
    torch.testing.assert_close(native.loss, twin.loss, rtol=1e-9, atol=0)


def test_threads_and_rows_of_a_range_change_nothing() -> None:
    w, _, factor = layer(70, 48)
    found, before = grid("levels", w, 4), torch.get_num_threads()
    whole = exact_sweep(w, factor, found)
    alone = [exact_sweep(w[row : row + 1], factor, found.select_rows(torch.tensor([row]))) for row in (0, 37, 69)]
    torch.set_num_threads(5)
    try:
        threaded = exact_sweep(w, factor, found)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(threaded.codes, whole.codes) and torch.equal(threaded.loss, whole.loss)
    assert all(torch.equal(one.codes[0], whole.codes[row]) for one, row in zip(alone, (0, 37, 69), strict=True))


def test_bounded_memory_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEANGRID_KERNELS", "torch")
    w, _, factor = layer(7, 30)
    found = grid("minmax", w, 3, 10)
    whole = exact_sweep(w, factor, found)
    monkeypatch.setattr(exact, "CHUNK_BYTES", 2 * 30 * 30 * 8)
    assert torch.equal(exact_sweep(w, factor, found).codes, whole.codes)


def test_arguments_that_do_not_fit_are_refused() -> None:
    w, inverse, levels = torch.randn(3, 4), torch.eye(4, dtype=torch.float64), torch.linspace(-1, 1, 4).repeat(3, 1)
    for changed in (
        {"inverse": inverse.float()},
        {"inverse": inverse[:3, :3]},
        {"inverse": -inverse},
        {"levels": levels[:2]},
        {"weight": w * torch.inf},
    ):
        with pytest.raises(ShapeError, match="exact_levels"):
            kernels.exact_levels(**{"weight": w, "inverse": inverse, "levels": levels} | changed)

"""The sweep: its own loss, its blocks, and how it moves with rows and scales."""

import pytest
import torch
from math_problems import grid, hessian, layer, losses, weight

from leangrid.solve.factor import factorize
from leangrid.solve.sweep import sweep

KINDS = [("minmax", None), ("minmax", 11), ("affine", 33), ("offset", 33), ("levels", None)]


@pytest.mark.parametrize(("kind", "group_size"), KINDS)
@pytest.mark.parametrize("bits", [2, 4])
def test_the_sum_of_eps_is_the_loss_under_the_damped_hessian(kind: str, group_size: int | None, bits: int) -> None:
    w, _, factor = layer(9, 165)
    found = grid(kind, w, bits, group_size)
    swept = sweep(w, factor, found)
    torch.testing.assert_close(swept.loss, losses(found.dequantize(swept.codes), w, factor.damped), rtol=1e-4, atol=0)
    assert float(swept.loss.sum()) < float(losses(found.dequantize(found.nearest(w)), w, factor.damped).sum())


@pytest.mark.parametrize(("kind", "group_size"), KINDS)
def test_permuting_rows_permutes_codes(kind: str, group_size: int | None) -> None:
    w, _, factor = layer(12, 165)
    found, order = grid(kind, w, 3, group_size), torch.randperm(12, generator=torch.Generator().manual_seed(0))
    straight, permuted = sweep(w, factor, found), sweep(w[order], factor, found.select_rows(order))
    assert torch.equal(straight.codes[order], permuted.codes)


@pytest.mark.parametrize("kind", ["minmax", "levels"])
@pytest.mark.parametrize(("weight_scale", "hessian_scale"), [(4.0, 1.0), (1.0, 2.0**-20), (0.125, 2.0**14)])
def test_scaling_weights_or_hessian_changes_no_code(kind: str, weight_scale: float, hessian_scale: float) -> None:
    w, matrix = weight(6, 70), hessian(70)
    one = sweep(w, factorize(matrix), grid(kind, w, 3))
    other = sweep(w * weight_scale, factorize(matrix * hessian_scale), grid(kind, w * weight_scale, 3))
    assert torch.equal(one.codes, other.codes)
    torch.testing.assert_close(one.loss * weight_scale**2 * hessian_scale, other.loss, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("kind", "group_size"), [("minmax", None), ("minmax", 8), ("offset", 8), ("levels", None)])
def test_without_correlations_the_sweep_rounds_each_column_in_its_own_group(kind: str, group_size: int | None) -> None:
    w = weight(5, 40)
    w[:, 16:24] *= 50  # one group far larger, and an elimination order that mixes the groups
    found = grid(kind, w, 3, group_size)
    diagonal = torch.rand(40, generator=torch.Generator().manual_seed(1)) + 0.5
    assert torch.equal(sweep(w, factorize(torch.diag(diagonal)), found).codes, found.nearest(w))

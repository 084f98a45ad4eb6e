"""The counted operations of scaling.py are those that torch does, and the exponent is a slope."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode


def test_an_exponent_is_the_slope_on_logarithms(bench: Any) -> None:
    scaling = bench("scaling")
    assert scaling.slope([1.0, 2.0, 4.0], [3.0, 24.0, 192.0]) == pytest.approx(3.0)
    assert scaling.slope([64.0, 256.0], [5.0, 5.0]) == pytest.approx(0.0)


def counted(work: Any) -> float:
    def product(sum_: Any, a: Any, b: Any, out_shape: Any = None, **rest: Any) -> int:
        return 2 * a[0] * a[1] * b[1]

    in_place = {torch.ops.aten.addmm_: product}  # which the counter leaves out
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        work()
    return float(counter.get_total_flops())


@pytest.mark.parametrize("cols", [96, 640, 1100])
def test_the_hessian_costs_what_its_products_cost(bench: Any, cols: int) -> None:
    scaling = bench("scaling")
    at = scaling.Point(cols=cols, tokens=32)
    assert scaling.hessian_cost(at).flops == counted(scaling.STAGES["hessian"].prepare(at))


@pytest.mark.parametrize("cols", [128, 320, 384])
def test_the_sweep_costs_its_trailing_products_and_what_is_inside_blocks(bench: Any, cols: int) -> None:
    scaling = bench("scaling")
    at = scaling.Point(rows=8, cols=cols, group_size=64)
    inside = (
        2.0 * at.rows * sum(j % scaling.BLOCK for j in range(cols))
    )  # column j of a block corrects what is left of it
    assert scaling.sweep_cost(at).flops == counted(scaling.STAGES["sweep"].prepare(at)) + inside


def test_the_refit_of_scales_costs_its_products(bench: Any) -> None:
    scaling = bench("scaling")
    at = scaling.Point(rows=8, cols=384, group_size=64)
    groups = at.cols // at.group_size
    elsewhere = 2 * at.rows * groups**3 / 3 + 2.0 * at.rows * sum(
        j % scaling.BLOCK for j in range(at.cols)
    )  # LAPACK, and our own kernel
    found = counted(scaling.STAGES["refine"].prepare(at))
    assert scaling.refine_affine_cost(at).flops == pytest.approx(found + elsewhere, rel=1e-9)


def test_every_stage_runs_and_its_line_is_whole(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    scaling = bench("scaling")
    monkeypatch.setattr(scaling, "ENOUGH_SECONDS", 0.0)
    base = scaling.Point(rows=4, cols=64, tokens=16, steps=64, group_size=32)
    monkeypatch.setattr(
        scaling,
        "VALUES",
        {
            "rows": (4, 8),
            "cols": (32, 64),
            "tokens": (8, 16),
            "steps": (16, 64),
            "bits": (2, 4),
            "group_size": (16, 32, 48),
        },
    )
    for name, stage in scaling.STAGES.items():
        for variable in stage.variables:
            line = scaling.measure_stage(name, variable, base, 1)
            assert len(line["values"]) == len(line["seconds"]) == len(line["bytes"]) == 2  # 48 columns do not divide 64
            assert all(second >= 0 for second in line["seconds"])


def test_the_problem_is_what_its_docstring_says(bench: Any) -> None:
    scaling = bench("scaling")
    eigenvalues = torch.linalg.eigvalsh(scaling.hessian(64).double())
    assert float(eigenvalues.min()) > 0
    assert torch.equal(scaling.weight(4, 64), scaling.weight(4, 64))

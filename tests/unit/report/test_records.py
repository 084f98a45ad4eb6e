"""A record a layer: what it takes from the solver, and that a line is strict JSON that comes back whole."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from leangrid.errors import VerifyError
from leangrid.recipe import Recipe
from leangrid.report.records import LayerRecord, read_records, to_lines, totals
from leangrid.solve.factor import FactorSummary, factorize
from leangrid.solve.hessian import HessianSum
from leangrid.solve.layer import solve_linear
from leangrid.solve.rescue import Rescue

RECORD = LayerRecord(
    name="model.layers.0.mlp.down_proj",
    shape=(8, 16),
    scheme="NU3",
    loss=1.0,
    loss_minmax=2.5,
    loss_rounding=4.0,
    damping=0.01,
    rescues=(Rescue("dead_columns", "3 of 16 columns", 3),),
    seconds={"grid": 0.5},
    tokens=64,
)


def test_a_record_says_what_the_solver_did() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 16, generator=generator)
    x[:, 5] = 0
    x[7] = math.nan
    total = HessianSum(16)
    total.add(x)
    hessian, recipe = total.finish(), Recipe(scheme="NU3").resolved()
    factor = factorize(hessian.matrix, recipe.damping, recipe.act_order)
    result = solve_linear(torch.randn(8, 16, generator=generator), factor, hessian.matrix, recipe)
    record = LayerRecord.of(
        "a.b", recipe, result, FactorSummary.of(hessian, factor), {"grid": 0.12345, "solve": 0.5, "refine": 0.25}
    )
    assert (record.name, record.shape, record.scheme, record.tokens, record.damping) == (
        "a.b",
        (8, 16),
        "NU3",
        199,
        0.01,
    )
    assert (record.loss, record.loss_minmax, record.loss_rounding) == (
        result.loss,
        result.loss_minmax,
        result.loss_rounding,
    )
    kinds = [rescue.kind for rescue in record.rescues]
    assert kinds.count("nonfinite_tokens") == 1 and kinds.count("dead_columns") == 1
    assert record.rescued  # lost tokens count
    assert record.correct == 0
    assert record.seconds == {"grid": 0.1235, "solve": 0.5, "refine": 0.25}


def test_records_of_older_versions_say_no_share() -> None:
    line = replace(RECORD, correct=0.25).to_json()
    assert LayerRecord.from_json(line).correct == 0.25
    del line["correct"]
    assert LayerRecord.from_json(line) == RECORD


def test_notes_are_no_rescues() -> None:
    assert not RECORD.rescued
    assert replace(RECORD, rescues=(*RECORD.rescues, Rescue("damping", "0.1 instead of 0.01"))).rescued


def test_lines_come_back_as_they_were(tmp_path: Path) -> None:
    records = [RECORD, replace(RECORD, name="other", rescues=())]
    file = tmp_path / "records.jsonl"
    file.write_text(to_lines(records))
    assert read_records(file) == records
    assert [json.loads(line)["shape"] for line in file.read_text().splitlines()] == [[8, 16], [8, 16]]
    assert totals(records) == {"loss": 2.0, "loss_minmax": 5.0, "loss_rounding": 8.0}


def test_a_line_is_strict_json() -> None:
    line = to_lines([replace(RECORD, loss_rounding=math.inf, loss=math.nan)])

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    found = json.loads(line, parse_constant=refuse)
    assert found["loss"] is None and found["loss_rounding"] is None and found["loss_minmax"] == 2.5


@pytest.mark.parametrize(
    "line", ["not json", '{"name": "x"}', "[]", to_lines([RECORD]).replace("dead_columns", "magic").strip()]
)
def test_a_line_of_another_kind_is_named(line: str, tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    file.write_text(to_lines([RECORD]) + line + "\n")
    with pytest.raises(VerifyError, match=r"records\.jsonl:2"):
        read_records(file)

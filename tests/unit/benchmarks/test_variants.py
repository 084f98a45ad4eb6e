"""Which recipes a scheme is compared with."""

from typing import Any

import pytest


def test_variants(bench: Any) -> None:
    from leangrid.recipe import Recipe

    variants = bench("common.variants")
    found = variants.parse(["default,paper", "quarter:correct=0.25,refine=2"])
    assert list(found) == ["default", "paper", "quarter"]
    paper, quarter = (Recipe(scheme="NU4", **found[name]).resolved() for name in ("paper", "quarter"))
    assert (paper.p, paper.correct, paper.refine, paper.guard) == (4.0, 0.0, 0, False)
    assert (quarter.p, quarter.correct, quarter.refine, quarter.guard) == (4.0, 0.25, 2, True)
    for wrong in ("papers", "default:p=2", "x:p"):
        with pytest.raises(SystemExit):
            variants.parse([wrong])


def test_a_baseline_repeats_no_work(bench: Any) -> None:
    from leangrid.recipe import Recipe

    does = bench("common.variants").does

    def of(scheme: str, **fields: Any) -> str:
        return does(Recipe(scheme=scheme, **fields).resolved())

    assert of("GPTQ4") == of("GPTQ4", p=4, guard=False) != of("GPTQ4", correct=0.5)
    assert of("NU4") == of("NU4", steps=64) != of("NU4", p=2)
    assert of("W4A16") == of("W4A16", search="lloyd") != of("W4A16", steps=64)

"""``leangrid.verify``: its result is true for an intact directory and lists the differences of another."""

from pathlib import Path

import pytest
from tiny_run import run, write_source

import leangrid
from leangrid.errors import VerifyError


@pytest.mark.fault("O4")
def test_the_truth_of_an_answer_is_that_nothing_differs(tmp_path: Path) -> None:
    run(write_source(tmp_path / "source"), tmp_path / "out")
    good = leangrid.verify(str(tmp_path / "out"))
    assert (
        good
        and len(good) == 0
        and list(good) == []
        and good == []
        and str(good).endswith("every file is as its manifest says")
    )
    (tmp_path / "out" / "tokenizer.json").unlink()
    bad = leangrid.verify(tmp_path / "out")
    assert (
        not bad
        and len(bad) == 1
        and bad.differences == ("tokenizer.json: missing",)
        and bad == ["tokenizer.json: missing"]
    )
    assert list(bad) == ["tokenizer.json: missing"] and bad != good and str(bad) == "tokenizer.json: missing"
    with pytest.raises(VerifyError):
        leangrid.verify(tmp_path / "nowhere")

"""Where a number comes from: the command and the machine in a result line."""

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]


def test_a_line_says_where_it_comes_from(bench: Any) -> None:
    found = bench("common.machine").provenance([str(ROOT / "benchmarks" / "quality.py"), "--windows", "12"])
    assert found["command"] == "python benchmarks/quality.py --windows 12"
    assert {"python", "torch", "transformers", "leangrid"} <= found["versions"].keys()
    assert found["machine"]["cores"] >= 1 and found["machine"]["cpu"]
    assert len(found["date"]) == 10
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        (str(ROOT / "demo" / "source"), "demo/source"),
        ("/somewhere/else/wiki.test.raw", "wiki.test.raw"),
        (f"{ROOT.parent}/{ROOT.name}-other/x.txt", "x.txt"),
        ("../beside/c4.jsonl", "c4.jsonl"),
        ("--text=/somewhere/else/a b.txt", "--text=a b.txt"),
        ("org/name", "org/name"),
        ("half:correct=0.25,p=2", "half:correct=0.25,p=2"),
        ("W4A16_G64,NU4", "W4A16_G64,NU4"),
    ],
)
def test_a_command_names_no_folder_of_this_machine(
    bench: Any, monkeypatch: pytest.MonkeyPatch, argument: str, expected: str
) -> None:
    monkeypatch.chdir(ROOT)
    assert bench("common.machine").shown(argument) == expected

"""Which line a measurement replaces, and how several are run one after another."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]


LINES: list[dict[str, Any]] = [
    {
        "model": "A",
        "scheme": "NU4",
        "variant": "default",
        "bits": 4.5,
        "kl_mean": 0.1017,
        "recipe": {"p": 4.0},
        "seconds": {"total": 61.2},
    },
    {
        "model": "A",
        "scheme": "NU4",
        "variant": "paper",
        "bits": 4.5,
        "kl_mean": 0.1181,
        "recipe": {"p": 4.0},
        "seconds": {"total": 40.0},
    },
    {
        "model": "A",
        "scheme": "RTN4",
        "variant": "default",
        "bits": 4.0,
        "kl_mean": None,
        "recipe": {"p": 2.0},
        "seconds": {"total": 9.0},
    },
    {
        "model": "B",
        "scheme": "NU4",
        "variant": "default",
        "bits": 10.8,
        "kl_mean": 0.02,
        "recipe": {"p": 4.0},
        "seconds": {"total": 1.0},
    },
]


def test_the_same_measurement_replaces_its_line(bench: Any, tmp_path: Path) -> None:
    lines, path = bench("common.lines"), tmp_path / "new" / "quality.jsonl"
    lines.add(path, {**LINES[0], "kl_p99": float("inf")})
    lines.add(path, LINES[1])
    lines.add(path, {**LINES[0], "kl_mean": 0.09})
    lines.add(path, {**LINES[0], "recipe": {"p": 2.0}})
    lines.add(path, {**LINES[1], "kl_mean": 0.2, "machine": {"cpu": "another"}})
    found = lines.read(path)
    assert [(line["variant"], line["kl_mean"], line["recipe"]["p"]) for line in found] == [
        ("default", 0.09, 4.0),
        ("paper", 0.1181, 4.0),
        ("default", 0.1017, 2.0),
        ("paper", 0.2, 4.0),
    ]
    assert not list(path.parent.glob("*.part"))


def test_what_a_script_prints_is_kept_and_shown(bench: Any, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    printed = [
        '{"benchmark": "b", "rows": 64, "s": 1}',
        "a remark",
        '{"benchmark": "b", "rows": 128, "s": 2}',
        '{"benchmark": "b", "rows": 64, "s": 3}',
    ]
    command = [sys.executable, str(ROOT / "benchmarks" / "common" / "lines.py"), str(path)]
    done = subprocess.run(command, input="\n".join(printed) + "\n", capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == printed
    assert [line["s"] for line in bench("common.lines").read(path)] == [3, 2]


def test_a_figure_that_is_not_finite_becomes_null(bench: Any) -> None:
    text = bench("common.lines").text({"kl": float("nan"), "inside": {"x": [float("inf"), 1.5]}, "name": "é"})
    assert json.loads(text) == {"kl": None, "inside": {"x": [None, 1.5]}, "name": "é"}


def test_committed_results_are_lines_of_ours(bench: Any) -> None:
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.jsonl")):
        found = bench("common.lines").read(path)
        identities = [bench("common.lines").identity(line) for line in found]
        assert len(set(identities)) == len(identities), path.name
        for line in found:
            assert {"benchmark", "command", "versions", "machine", "date"} <= line.keys(), path.name


def test_lines_are_kept_one_by_one_and_found_again(
    tmp_path: Path, bench: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    task_list, lines, out = bench("common.task_list"), bench("common.lines"), tmp_path / "quality.jsonl"
    heads = [
        {"benchmark": "quality", "model": "A", "scheme": scheme, "variant": "default"}
        for scheme in ("NU4", "NU3", "NU2")
    ]

    def fails() -> dict[str, Any]:
        raise task_list.quantize_process.Failed("NU3: the quantizing process ended with 9")

    measures = (lambda: {"kl_mean": 0.1}, fails, lambda: {"kl_mean": 0.2})
    with pytest.raises(SystemExit, match="default NU3: the quantizing process ended with 9"):
        task_list.run_each(zip(heads, measures, strict=True), out)
    kept = lines.read(out)
    assert [(line["scheme"], line["kl_mean"]) for line in kept] == [("NU4", 0.1), ("NU2", 0.2)]
    assert [json.loads(line)["scheme"] for line in capsys.readouterr().out.splitlines()] == ["NU4", "NU2"]
    origin, done = bench("common.machine").provenance(), {lines.identity(line) for line in kept}
    assert [lines.identity(head | origin) in done for head in heads] == [True, False, True], (
        "what --skip-done leaves out"
    )

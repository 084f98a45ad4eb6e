"""The benchmarks' own bookkeeping: where a number comes from, which line it replaces, and how it reaches the README."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
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


@pytest.fixture
def results(tmp_path: Path) -> Path:
    (tmp_path / "quality.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES), encoding="utf-8")
    (tmp_path / "demo.json").write_text(json.dumps({"rows": LINES}), encoding="utf-8")
    return tmp_path


def test_a_line_says_where_it_comes_from(bench: Any) -> None:
    found = bench("machine").provenance([str(ROOT / "benchmarks" / "quality.py"), "--windows", "12"])
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
    assert bench("machine").shown(argument) == expected


def test_the_same_measurement_replaces_its_line(bench: Any, tmp_path: Path) -> None:
    lines, path = bench("lines"), tmp_path / "new" / "quality.jsonl"
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
    command = [sys.executable, str(ROOT / "benchmarks" / "lines.py"), str(path)]
    done = subprocess.run(command, input="\n".join(printed) + "\n", capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == printed
    assert [line["s"] for line in bench("lines").read(path)] == [3, 2]


def test_a_figure_that_is_not_finite_becomes_null(bench: Any) -> None:
    text = bench("lines").text({"kl": float("nan"), "inside": {"x": [float("inf"), 1.5]}, "name": "é"})
    assert json.loads(text) == {"kl": None, "inside": {"x": [None, 1.5]}, "name": "é"}


def test_a_list(bench: Any, results: Path) -> None:
    text = "a\n<!-- table: quality.jsonl model=A | scheme, kl_mean:.3f=KL, recipe.p:.0f -->\nold\n<!-- end -->\nb\n"
    wanted = "| scheme | KL | p |\n| --- | ---: | ---: |\n| NU4 | 0.102 | 4 |\n| NU4 | 0.118 | 4 |\n| RTN4 |  | 2 |\n"
    found = bench("table").rendered(text, results)
    assert wanted in found and "old" not in found and found.startswith("a\n") and found.endswith("-->\nb\n")
    assert bench("table").rendered(found, results) == found
    assert wanted in bench("table").rendered(text.replace("quality.jsonl", "demo.json"), results)


def test_a_pivot(bench: Any, results: Path) -> None:
    marker = "<!-- pivot: quality.jsonl model=A | scheme, bits:.1f | variant: default, paper=the paper | kl_mean:.3f, seconds.total:.0f -->"
    found = bench("table").rendered(f"{marker}\n<!-- end -->", results)
    assert found.splitlines()[1:-1] == [
        "| scheme | bits | default | the paper |",
        "| --- | ---: | ---: | ---: |",
        "| NU4 | 4.5 | 0.102 / 61 | 0.118 / 40 |",
        "| RTN4 | 4.0 |  / 9 |  |",
    ]


def test_a_table_without_lines_is_refused(bench: Any, results: Path) -> None:
    with pytest.raises(SystemExit, match=r"no line of quality\.jsonl has model=C"):
        bench("table").rendered("<!-- table: quality.jsonl model=C | scheme -->\n<!-- end -->", results)
    for lacking in ("quality.jsonl model=C", "experiments/results/none.jsonl"):
        shown = bench("table").rendered(
            f"<!-- pivot?: {lacking} | scheme | variant: a | kl_mean -->\nold\n<!-- end -->", results
        )
        assert shown == f"<!-- pivot?: {lacking} | scheme | variant: a | kl_mean -->\n*Not run yet.*\n<!-- end -->"
    with pytest.raises(SystemExit, match="cannot read"):
        bench("table").rendered("<!-- pivot: quality.jsonl | scheme | kl_mean -->\n<!-- end -->", results)


def test_the_pages_are_up_to_date(bench: Any) -> None:
    for page in bench("table").PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        assert bench("table").rendered(text) == text, f"{page}: python benchmarks/table.py"


def test_committed_results_are_lines_of_ours(bench: Any) -> None:
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.jsonl")):
        found = bench("lines").read(path)
        identities = [bench("lines").identity(line) for line in found]
        assert len(set(identities)) == len(identities), path.name
        for line in found:
            assert {"benchmark", "command", "versions", "machine", "date"} <= line.keys(), path.name


def test_variants(bench: Any) -> None:
    from leangrid.recipe import Recipe

    variants = bench("variants")
    found = variants.parse(["default,paper", "quarter:correct=0.25,refine=2"])
    assert list(found) == ["default", "paper", "quarter"]
    paper, quarter = (Recipe.build(scheme="NU4", **found[name]).resolved() for name in ("paper", "quarter"))
    assert (paper.p, paper.correct, paper.refine, paper.guard) == (4.0, 0.0, 0, False)
    assert (quarter.p, quarter.correct, quarter.refine, quarter.guard) == (4.0, 0.25, 2, True)
    for wrong in ("papers", "default:p=2", "x:p"):
        with pytest.raises(SystemExit):
            variants.parse([wrong])


def test_a_baseline_repeats_no_work(bench: Any) -> None:
    from leangrid.recipe import Recipe

    does = bench("variants").does

    def of(scheme: str, **fields: Any) -> str:
        return does(Recipe.build(scheme=scheme, **fields).resolved())

    assert of("GPTQ4") == of("GPTQ4", p=4, guard=False) != of("GPTQ4", correct=0.5)
    assert of("NU4") == of("NU4", steps=64) != of("NU4", p=2)
    assert of("W4A16") == of("W4A16", search="lloyd") != of("W4A16", steps=64)


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="Linux tells")
def test_a_child_reports_its_own_peak_memory(bench: Any) -> None:
    program = f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); import once; print(once.own_peak())"
    ours = np.ones(40_000_000)  # 320 MB that belong to the parent
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert 1e6 < int(done.stdout) < ours.nbytes / 2


def test_lines_are_kept_one_by_one_and_found_again(
    tmp_path: Path, bench: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    quality, lines, out = bench("quality"), bench("lines"), tmp_path / "quality.jsonl"
    heads = [
        {"benchmark": "quality", "model": "A", "scheme": scheme, "variant": "default"}
        for scheme in ("NU4", "NU3", "NU2")
    ]

    def fails() -> dict[str, Any]:
        raise quality.once.Failed("NU3: the quantizing process ended with 9")

    measures = (lambda: {"kl_mean": 0.1}, fails, lambda: {"kl_mean": 0.2})
    with pytest.raises(SystemExit, match="default NU3: the quantizing process ended with 9"):
        quality.keep_each(zip(heads, measures, strict=True), out)
    kept = lines.read(out)
    assert [(line["scheme"], line["kl_mean"]) for line in kept] == [("NU4", 0.1), ("NU2", 0.2)]
    assert [json.loads(line)["scheme"] for line in capsys.readouterr().out.splitlines()] == ["NU4", "NU2"]
    origin, done = bench("machine").provenance(), {lines.identity(line) for line in kept}
    assert [lines.identity(head | origin) in done for head in heads] == [True, False, True], (
        "what --skip-done leaves out"
    )

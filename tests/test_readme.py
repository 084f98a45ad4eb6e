"""The commands, options, Python names, schemes and file names in the pages exist. Their links and anchors are tested in
test_docs.py, their generated tables in unit/benchmarks/test_table.py."""

import ast
import importlib
import inspect
import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import leangrid

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = ("README.md", "ARCHITECTURE.md", "benchmarks/README.md", "experiments/README.md")
PAGES = (*OUTSIDE, *(path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").rglob("*.md"))))
TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
README = TEXTS["README.md"]
# Where a file that a page names may be. docs/log.md names files of the time of its entries.
FOLDERS = (ROOT, ROOT / "src" / "leangrid", ROOT / "benchmarks", ROOT / "benchmarks/common", ROOT / "experiments")
HISTORY = ("docs/log.md",)


def blocks(language: str) -> Iterator[tuple[str, str]]:
    """Page and text of every fenced block of a language."""
    for page, text in TEXTS.items():
        for block in re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            yield page, block


def commands(program: str) -> list[list[str]]:
    """The words behind ``program`` in every shell line of the pages that runs it."""
    found: list[list[str]] = []
    for _, block in blocks("bash"):
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            for part in re.split(r"&&|;", re.sub(r"\s#.*", "", line)):
                words = shlex.split(part)
                for at, word in enumerate(words[:-1]):
                    if word == program and (at == 0 or words[at - 1] == "-m"):
                        found.append(words[at + 1 :])
    return found


def cli() -> Any:
    typer: Any = importlib.import_module("typer")
    return typer.main.get_command(importlib.import_module("leangrid.cli.app").app)


LEANGRID = [words for words in commands("leangrid") if words[0] in cli().commands]


def test_there_are_commands_to_test() -> None:
    assert len(LEANGRID) > 15
    assert all(words[0] in cli().commands for words in commands("leangrid"))


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_the_text_exist(page: str) -> None:
    for line in re.findall(r"`leangrid (\w[^`\n]*)`", re.sub(r"(?s)```.*?```", "", TEXTS[page])):
        words = line.split()
        known = {name for option in cli().commands[words[0]].params for name in option.opts}
        assert {word for word in words if word.startswith("--")} <= known, f"{page}: {line}"


@pytest.mark.parametrize("words", LEANGRID, ids=" ".join)
def test_the_command_line_parses(words: list[str]) -> None:
    cli().commands[words[0]].make_context(words[0], words[1:])  # raises what a user would see; runs nothing


@pytest.mark.parametrize("page", PAGES)
def test_options_that_the_text_names_exist(page: str) -> None:
    if page in (*HISTORY, "benchmarks/README.md", "experiments/README.md") or page.startswith("docs/decisions/"):
        return  # these name options of scripts and of other programs as well
    known = {name for command in cli().commands.values() for option in command.params for name in option.opts}
    scripts = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "benchmarks").rglob("*.py"))
    text = re.sub(r"(?s)```.*?```", "", TEXTS[page])
    named = set(re.findall(r"`(--[a-z-]+)[ `]", text))
    assert {name for name in named - known if f'"{name}"' not in scripts} <= {"--dtype", "--no-deps"}, page


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {words[0] for words in commands("make")}
    named |= {target for text in TEXTS.values() for target in re.findall(r"`make ([a-z-]+)", text)}
    assert named and named <= targets


def test_scripts_and_their_options_exist() -> None:
    runs = [words for python in ("python", ".venv/bin/python") for words in commands(python) if words[0] != "-m"]
    assert runs
    for words in runs:
        script = ROOT / words[0]
        assert script.is_file(), words
        code = "".join(path.read_text(encoding="utf-8") for path in script.parent.rglob("*.py"))
        assert all(f'"{word}"' in code for word in words if word.startswith("--")), words


@pytest.mark.parametrize("block", [pytest.param(block, id=page) for page, block in blocks("python")])
def test_python_blocks_name_what_exists(block: str, tmp_path: Path) -> None:
    tree = ast.parse(block)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and re.fullmatch(r"leangrid\.\w+", ast.unparse(node.func)):
            function = getattr(leangrid, ast.unparse(node.func).partition(".")[2])
            inspect.signature(function).bind(*node.args, **{keyword.arg or "": None for keyword in node.keywords})
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("leangrid"):
            assert all(hasattr(importlib.import_module(node.module or ""), name.name) for name in node.names)
    if "torch.randn" in block:  # tensors alone: it runs as it stands
        (tmp_path / "block.py").write_text(block, encoding="utf-8")
        runpy.run_path(str(tmp_path / "block.py"))


def test_schemes_parse() -> None:
    for text in (README, TEXTS["docs/choosing.md"], TEXTS["docs/formats.md"], TEXTS["docs/serving.md"]):
        schemes = re.findall(r"`((?:W\d+A16|NU\d|GPTQ\d|RTN\d|Q\d_[K0-9])(?:_\w+)?)`", text)
        assert len(schemes) > 2
        for scheme in schemes:
            leangrid.Scheme.parse(scheme)


@pytest.mark.parametrize("page", [page for page in PAGES if page not in HISTORY])
def test_files_and_names_in_code_exist(page: str) -> None:
    """``folder/file.py`` anywhere; ``folder/file.py: Name.member`` in the source; ``tests/file.py::test``."""
    for file, test, name in re.findall(
        r"`([\w./-]+\.(?:py|h|cpp|toml|jsonl|jinja))(?:::(\w+))?(?:: ([\w.]+))?`", TEXTS[page]
    ):
        if not (ROOT / file.partition("/")[0]).is_dir() and not (ROOT / "src/leangrid" / file).parent.is_dir():
            continue  # of another project
        here = [folder / file for folder in FOLDERS if (folder / file).is_file()]
        if "/" in file or name:
            assert here, f"{page}: {file}"
        if test:
            assert f"def {test}(" in here[0].read_text(encoding="utf-8"), f"{page}: {file}::{test}"
        if name:
            found: Any = importlib.import_module(f"leangrid.{file.removesuffix('.py').replace('/', '.')}")
            for part in name.split("."):
                assert hasattr(found, part), f"{page}: {file}: {name}"
                found = getattr(found, part)


def test_kernels_in_the_theory_exist() -> None:
    kernels = importlib.import_module("leangrid.kernels")
    patterns = re.findall(r"`kernels\.(\w+\*?)`", TEXTS["docs/theory.md"])
    assert patterns
    for pattern in patterns:
        assert any(re.fullmatch(pattern.replace("*", r"\w+"), name) for name in dir(kernels)), pattern


def test_the_readme_is_short_and_shows_measured_numbers() -> None:
    assert len(README.splitlines()) <= 125
    assert README.count("<!-- table:") == 1


def test_the_output_that_the_readme_shows_has_the_rows_of_the_program() -> None:
    printed = (ROOT / "src/leangrid/report/text.py").read_text(encoding="utf-8")
    outputs = re.findall(r"^```(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    lines = [line for language, block in outputs if not language for line in block.splitlines()]
    labels = [line.split("  ")[0] for line in lines if "  " in line]
    assert len(labels) > 15
    assert [label for label in labels if f'"{label}"' not in printed] == []

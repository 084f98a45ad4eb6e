"""The README cannot lie: its commands and names exist, its links lead somewhere; the theory names code that exists."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = (
    "README.md",
    "ARCHITECTURE.md",
    "benchmarks/README.md",
    "experiments/README.md",
    "docs/index.md",
    "docs/performance.md",
    "docs/serving.md",
    "docs/tasks.md",
)
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str, page: str = "README.md") -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def commands(program: str) -> list[list[str]]:
    """Every shell line of the pages that runs ``program``, split into words."""
    lines = [line for page in PAGES for block in blocks("bash", page) for line in block.splitlines()]
    parts = [part.strip() for line in lines for part in re.split(r"&&|;", line.split("  #")[0])]
    return [shlex.split(part) for part in parts if part.startswith(program + " ")]


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    named = {words[1] for words in commands("make")} | set(re.findall(r"`make ([a-z-]+)`", README))
    assert named and named <= targets


def test_leangrid_commands_and_options_exist() -> None:
    typer = importlib.import_module("typer")
    known = typer.main.get_command(importlib.import_module("leangrid.cli.app").app).commands
    used = commands("leangrid")
    assert used
    for words in used:
        assert words[1] in known, words
        options = {name for parameter in known[words[1]].params for name in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options, words
    mentioned = set(re.findall(r"`(--[a-z-]+)[ `]", README))
    assert mentioned <= {name for command in known.values() for parameter in command.params for name in parameter.opts}


def test_python_names_exist() -> None:
    leangrid = importlib.import_module("leangrid")
    for block in blocks("python"):
        compile(block, "README.md", "exec")
        for name in re.findall(r"leangrid\.(\w+)\(", block):
            assert callable(getattr(leangrid, name))


def test_schemes_parse() -> None:
    from leangrid.recipe import Scheme

    schemes = re.findall(r"`((?:W\dA16|NU\d|GPTQ\d|RTN\d)\w*)`", README)
    assert len(schemes) > 5
    for scheme in schemes:
        Scheme.parse(scheme)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if not target.startswith("http"):
            assert (ROOT / page).parent.joinpath(target.split("#")[0]).exists(), f"{page}: {target}"


def test_tables_are_there() -> None:
    # That they are up to date is tested beside the benchmarks, whose lines they show.
    assert README.count("<!-- table:") + README.count("<!-- pivot:") >= 2


def test_theory_names_code_that_exists() -> None:
    text = (ROOT / "docs" / "theory.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]+)\.py(?:: (\w+)(?:\.(\w+))?)?`", text)
    assert len(named) > 10
    for file, name, member in named:
        found = importlib.import_module(f"leangrid.{file.replace('/', '.')}")
        for part in filter(None, (name, member)):
            found = getattr(found, part)
    kernels = importlib.import_module("leangrid.kernels")
    for pattern in re.findall(r"`kernels\.(\w+\*?)`", text):
        assert any(re.fullmatch(pattern.replace("*", r"\w+"), name) for name in dir(kernels)), pattern

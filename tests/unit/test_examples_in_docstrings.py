"""The examples in the docstrings of the public names run, and print what they say."""

import doctest
import importlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

import leangrid
from leangrid.inference.load import load

API = Path(__file__).parents[2] / "docs" / "api.md"
NAMES = [name for name in re.findall(r"^::: leangrid\.(\S+)$", API.read_text(), re.M) if name != "errors"]
pytestmark = pytest.mark.filterwarnings("ignore:leangrid runs without its C")


@pytest.fixture(scope="module")
def prepared(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the examples read: ``model``, a checkpoint; ``out``, a result of it; and ``text.txt``."""
    folder = tmp_path_factory.mktemp("examples")
    shutil.copytree(tiny("llama3"), folder / "model")
    leangrid.quantize(
        folder / "model", folder / "out", leangrid.Recipe(scheme="NU4"), windows=tiny_models.tokens(4, 32)
    )
    text = "".join(f"Sentence number {index} of a text that is long enough.\n" for index in range(100))
    (folder / "text.txt").write_text(text)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_the_example_of_a_public_name_runs(
    name: str, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, _, leaf = name.rpartition(".")
    found: Any = getattr(importlib.import_module(f"leangrid.{module}"), leaf)
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    known = {"leangrid": leangrid, "torch": torch, "Path": Path}
    test = doctest.DocTestParser().get_doctest(found.__doc__ or "", known, name, None, 0)
    assert test.examples, "there is no example"
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    said: list[str] = []
    runner.run(test, out=said.append)
    assert not runner.failures, "".join(said)


def test_every_name_of_the_package_is_on_the_page() -> None:
    assert {name.rpartition(".")[2] for name in NAMES} >= {*leangrid.__all__} - {"__version__", "grids"}


def test_names_stay_themselves_whatever_is_imported() -> None:
    for module in ("inference.load", "planning.plan", "exporters.export", "evaluation.compare", "run.quantize"):
        importlib.import_module(f"leangrid.{module}")
    from leangrid import compare, evaluate, export, plan, quantize, verify

    assert all(callable(each) for each in (compare, evaluate, export, plan, quantize, verify))
    assert leangrid.load is load and set(leangrid.__all__) <= set(dir(leangrid))

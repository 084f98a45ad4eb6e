"""The lines and files that scripts/mutants.py and scripts/sanitize.py name are there."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]


def _script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"scripts_{name}", ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


MUTANTS = _script("mutants").MUTANTS


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_changes_one_place_and_has_a_test(name: str) -> None:
    mutant: Any = MUTANTS[name]
    source = ROOT / "src" / "leangrid" / mutant.file
    text = source.read_text(encoding="utf-8")
    assert text.count(mutant.old) == 1, f"{mutant.file} must hold this once: {mutant.old!r}"
    compile(text.replace(mutant.old, mutant.new), mutant.file, "exec")
    file, _, test = mutant.tests.partition("::")
    assert f"def {test}" in (ROOT / "tests" / file).read_text(encoding="utf-8")


def test_the_sanitizers_run_tests_that_exist() -> None:
    assert [test for test in _script("sanitize").TESTS if not (ROOT / test).is_file()] == []

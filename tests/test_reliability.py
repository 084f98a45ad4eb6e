"""docs/reliability.md is what the markers of the tests say, and no row of the fault table is without a test or a
reason."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_spec = importlib.util.spec_from_file_location("reliability", ROOT / "scripts" / "reliability.py")
assert _spec is not None and _spec.loader is not None
reliability = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reliability)


def test_every_fault_has_a_test_or_a_reason() -> None:
    tests = reliability.marked()
    assert len(reliability.FAULTS) == 64
    assert set(tests) <= set(reliability.FAULTS), "a marker that is no row of the table"
    assert set(reliability.FAULTS) - set(tests) == set(reliability.OPEN)


def test_the_table_is_current() -> None:
    assert reliability.PAGE.read_text(encoding="utf-8") == reliability.page(), "run: python scripts/reliability.py"

"""docs/reliability.md agrees with the markers of the tests, and every row of its table has a test or a reason."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_spec = importlib.util.spec_from_file_location("reliability", ROOT / "scripts" / "reliability.py")
assert _spec is not None and _spec.loader is not None
reliability = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reliability)


def test_every_fault_has_a_test_or_a_reason() -> None:
    tests = reliability.read_markers()
    assert len(reliability.FAULTS) == 64
    assert set(tests) <= set(reliability.FAULTS), "a marker that is no row of the table"
    assert set(reliability.FAULTS) - set(tests) == set(reliability.OPEN)


def test_the_table_is_current() -> None:
    assert reliability.PAGE.read_text(encoding="utf-8") == reliability.render_page(), (
        "run: python scripts/reliability.py"
    )

"""leangrid/__init__.py: public names are loaded when they are used."""

import pytest
from run_python import run_python

from leangrid.evaluation.results import Comparison


def test_import_leangrid_stays_light() -> None:
    heavy = ["torch", "transformers", "triton", "matplotlib", "numpy", "compressed_tensors"]
    done = run_python(f"import sys, leangrid; print([m for m in {heavy} if m in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr


def test_public_names_stay_functions_after_their_files_are_imported() -> None:
    import leangrid.inference.load

    assert callable(leangrid.load) and leangrid.load.__name__ == "load"
    with pytest.raises(AttributeError, match="no_such_name"):
        leangrid.no_such_name  # noqa: B018


def test_results_still_read_as_the_dicts_that_they_were() -> None:
    result = Comparison([], "by nothing", None, None, None)
    plain = result.to_dict()
    assert dict(result) == plain and list(result) == list(plain) and len(result) == len(plain)
    assert "rows" in result and result.get("nothing") is None and {**result} == plain

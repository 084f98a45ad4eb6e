"""docs/models.md is what scripts/models_page.py writes of the records of `make zoo`."""

import importlib.util
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
_spec = importlib.util.spec_from_file_location("scripts_models_page", ROOT / "scripts" / "models_page.py")
assert _spec is not None and _spec.loader is not None
models_page = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(models_page)


def _record(**changes: Any) -> dict[str, Any]:
    base = {
        "type": "llama",
        "family": "causal",
        "transformers": "5.23.0",
        "stage": "done",
        "faults": [],
        "cover": 1.0,
        "quantized": ["model.layers.*.self_attn.q_proj", "model.layers.*.self_attn.k_proj", "model.layers.*.mlp.up"],
        "kept": {"routes tokens": ["model.layers.*.mlp.gate"]},
        "schemes": ["RTN8", "NU4"],
        "figures": {"RTN8.plain": 0.0},
    }
    return base | changes


def test_a_row_names_what_is_quantized_what_stays_and_who_opens_it() -> None:
    page = models_page.page([_record()])
    assert (
        "| llama | `self_attn.{q_proj, k_proj}`, `mlp.up` | `mlp.gate`: routes tokens | transformers, leangrid |"
        in page
    )
    assert "| Causal language models | 1 | 1 | 0 | 0 | 0 | 0 |" in page


def test_a_refusal_and_a_failure_are_rows_and_counts_of_their_own() -> None:
    refused = _record(type="pi0", stage="quantize", refused=True, error="ArchitectureError: not on text alone")
    failing = _record(type="x", faults=["RTN8: walked 0.3, at most 0.0001"])
    broken = _record(type="y", stage="source", error="ValueError: no config")
    page = models_page.page([refused, failing, broken, _record(type="bart", cover=0.67)])
    assert "| pi0 | refused: not on text alone |" in page
    assert "| x | fails: RTN8: walked 0.3" in page
    assert "| y | not made by transformers: no config |" in page
    assert "33% of the matrices. " in page
    assert "| Causal language models | 4 | 0 | 1 | 1 | 1 | 1 |" in page


def test_the_page_is_the_one_that_its_records_give() -> None:
    records = models_page.read(models_page.RESULTS)
    assert models_page.page(records.values()) == models_page.PAGE.read_text(encoding="utf-8")


def test_counts_of_other_configs_name_those_that_failed() -> None:
    failing = _record(type="gptj", varied=["tied"], faults=["walked 0.3, at most 0.0001"])
    said = models_page.counts([_record(), _record(type="llama"), failing])
    assert said.splitlines() == [
        "fails: 1",
        "quantized: 2",
        "fails: causal gptj ['tied']: walked 0.3, at most 0.0001",
    ]

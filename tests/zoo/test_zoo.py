"""Every causal, image-text and encoder type of the installed transformers, tiny and random, from a source that
transformers wrote to a result that transformers opens (tests/support/zoo_run.py).

    make zoo                                    all of them
    make zoo TYPES="qwen3_5 gpt_oss"            some
    make zoo VARY=1                             other configs of them, which this seed draws (zoo_variants.changes)

``make test`` runs those in KINDS, which stand for the kinds of models. docs/models.md is made of the records."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import zoo_run
from zoo_configs import BROKEN, NOT_PLAIN, REFUSED
from zoo_models import FAMILIES, model_types
from zoo_plain import cover_faults
from zoo_server import Server

# A hybrid with a vision tower and further layers, its mixture, a tower, keys shared between blocks, biased and
# interleaved experts, compressed keys with grouped experts, experts in batches, Mamba beside attention, short
# convolutions, an MLP beside attention, an encoder with a decoder, Conv1D, blocks called again.
KINDS = {
    ("image-text", "qwen3_5"),
    ("causal", "qwen3_5_moe"),
    ("image-text", "qwen3_vl"),
    ("causal", "gemma4_text"),
    ("causal", "gpt_oss"),
    ("causal", "deepseek_v3"),
    ("causal", "llama4"),
    ("causal", "lfm2"),
    ("causal", "nemotron_h"),
    ("causal", "phi"),
    ("encoder", "t5"),
    ("causal", "gpt2"),
    ("encoder", "albert"),
}
TYPES = set(os.environ.get("TYPES", "").split())
VARY = int(os.environ["VARY"]) if os.environ.get("VARY") else None
RESULTS = os.environ.get("ZOO_RESULTS")
CASES = [
    pytest.param(family, name, id=f"{family}-{name}", marks=() if (family, name) in KINDS else pytest.mark.zoo)
    for family in FAMILIES
    for name in model_types(family)
    if not TYPES or name in TYPES
]


@pytest.fixture(scope="session")
def sides() -> Iterator[tuple[Server, Server]]:
    with zoo_run.servers() as both:
        yield both


@pytest.mark.parametrize(("family", "model_type"), CASES)
def test_a_type_goes_from_its_checkpoint_to_plain_transformers(
    family: str, model_type: str, sides: tuple[Server, Server]
) -> None:
    way = zoo_run.Way(command=(family, model_type) in KINDS, vary=VARY)
    record = zoo_run.trial(sides, model_type, family, way)
    if RESULTS:
        Path(RESULTS).mkdir(parents=True, exist_ok=True)
        (Path(RESULTS) / f"{family}.{model_type}.json").write_text(json.dumps(record), encoding="utf-8")
    if model_type in BROKEN:
        assert record["stage"] == "source", f"transformers makes it again: take it out of BROKEN ({BROKEN[model_type]})"
        return
    if (family, model_type) in REFUSED:
        assert record.get("refused") and REFUSED[family, model_type] in record["error"], zoo_run.line(record)
        return
    assert record["stage"] == "done" and not record["faults"], zoo_run.line(record)
    if VARY is not None:  # what is covered, and what transformers opens, is known of the usual config
        return
    assert not cover_faults(model_type, record["cover"])
    opens = any(name.endswith(".plain") and not name.startswith("NU4") for name in record["figures"])
    assert not (opens and (family, model_type) in NOT_PLAIN), "transformers opens it: take it out of NOT_PLAIN"

"""The model card holds the measured numbers, and strangers' names cannot break it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import yaml

from leangrid.recipe import Recipe
from leangrid.report.card import model_card
from leangrid.report.records import LayerRecord
from leangrid.rescue import Rescue

NOTE = Rescue("dead_columns", "3 of 16 columns", 3)
RECORD = LayerRecord("model.layers.0.mlp.down_proj", (8, 16), "NU3", 1.0, 2.5, 4.0, 0.01, (NOTE,), {"grid": 0.5}, 64)


def card(source: str = "org/name", scheme: str = "NU3", records: Sequence[LayerRecord] = (RECORD,), **more: Any) -> str:
    return model_card(source, Recipe(scheme=scheme).resolved(), records, bits_per_weight=3.125, version="9.9", **more)


def test_the_card_states_source_scheme_losses_and_settings() -> None:
    text = card(records=[RECORD, replace(RECORD, name="second", loss=7.0)])
    for fact in (
        "# name, NU3",
        "org/name",
        "8 levels",
        "each row",
        "3.125",
        "128 x 2048 tokens: c4, seed 0",
        "p 4.0, correct 0.5, refine 1",
    ):
        assert fact in text, fact
    assert "| this model | 8 |" in text and "| min-max GPTQ | 5 |" in text and "| rounding | 8 |" in text
    assert text.index("`second`") < text.index("`model.layers.0.mlp.down_proj`")  # the largest loss first
    assert "import leangrid" in text and "None: every layer" in text and "leangrid 9.9" in text
    assert "import leangrid" not in card(scheme="W4A16_G64") and "each group of 64" in card(scheme="W4A16_G64")


def test_rescues_are_listed_and_notes_are_not() -> None:
    text = card(records=[replace(RECORD, rescues=(*RECORD.rescues, Rescue("damping", "0.1 instead of 0.01")))])
    assert "damping: 0.1 instead of 0.01" in text and "dead_columns" not in text and "None: every" not in text


def test_measured_figures_appear_only_when_they_were_measured() -> None:
    assert "## Measured" not in card()
    evaluation = {"perplexity": 28.94, "kl_mean": 0.1171, "kl_p99": None, "windows": 12, "length": 1024, "text": "a/wiki.txt"}
    text = card(evaluation=evaluation)
    assert "| perplexity | 28.94 |" in text and "0.1171" in text and "99th" not in text and "12 windows of 1024 tokens of wiki.txt" in text


@pytest.mark.parametrize("source", ["org/name@v1", "./folder/model", "evil: [x\ny]|`<script>/name", 'a"b/c', "/"])
def test_the_header_is_yaml_whatever_the_source_is_called(source: str) -> None:
    text = card(source, license_name='x: "y')
    header = yaml.safe_load(text.split("---")[1])
    assert header["library_name"] == "transformers" and header["license"] == 'x: "y'
    assert header.get("base_model") == {"org/name@v1": "org/name", 'a"b/c': 'a"b/c'}.get(source, header.get("base_model"))
    assert "<script>" not in text.split("---", 2)[2]
    assert ("base_model" in header) == (source.count("/") == 1 and source != "/")


@pytest.mark.fault("O10")
def test_a_card_that_cannot_be_written_does_not_fail_the_run(caplog: pytest.LogCaptureFixture) -> None:
    text = card(evaluation={"perplexity": "not a number"})
    assert "records.jsonl" in text and "NU3" in text and "card could not be written" in caplog.text

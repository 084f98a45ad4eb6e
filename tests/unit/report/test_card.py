"""The model card holds the measured numbers, in the hub's format too, and strangers' names cannot break it."""

from dataclasses import replace
from typing import Any

import pytest
from huggingface_hub import ModelCard
from report_facts import EVALUATION, QUALITY, RECORD, facts, manifest

from leangrid.report.card import render_card
from leangrid.solve.rescue import Rescue


def card(*arguments: Any, **more: Any) -> str:
    return render_card(facts(*arguments, **{"quality": {}, **more}))


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


@pytest.mark.parametrize(
    ("structure", "name"),
    [
        ({"model": "T5Model"}, "T5Model"),
        ({"model": "```\nrm"}, "AutoModelForCausalLM"),
        ({}, "AutoModelForCausalLM"),
    ],
)
def test_the_card_opens_the_result_by_the_class_that_was_quantized(structure: dict, name: str) -> None:
    kinds = {} if not structure else {"lists": [], "blocks": 0, "calls": 0, "kinds": [], "flows": [], "idle": 0}
    text = card(scheme="W4A16_G64", structure=structure | kinds)
    assert f'from transformers import {name}\nmodel = {name}.from_pretrained("DIR")' in text


@pytest.mark.parametrize(("word", "alone"), [("yes", True), ("no: it has no place for packed experts", False)])
def test_the_card_opens_by_leangrid_what_transformers_alone_does_not(word: str, alone: bool) -> None:
    text = card(scheme="W4A16_G64", opened_in={"leangrid.load": "yes", "transformers": word})
    assert ("from transformers import" in text) is alone and ("leangrid.load(" in text) is not alone


def test_rescues_are_listed_and_notes_are_not() -> None:
    text = card(records=[replace(RECORD, rescues=(*RECORD.rescues, Rescue("damping", "0.1 instead of 0.01")))])
    assert "damping: 0.1 instead of 0.01" in text and "dead_columns" not in text and "None: every" not in text


def test_measured_figures_appear_only_when_they_were_measured() -> None:
    assert "## Measured" not in card()
    text = card(evaluations=[EVALUATION])
    assert "| perplexity | 28.94 |" in text and "0.1171" in text and "99th" not in text
    assert "12 windows of 1024 tokens of wiki.txt" in text
    text = card(quality=QUALITY)
    assert (
        "the first 2 calibration windows, 512 tokens of c4" in text
        and "| KL from the original, mean (nats) | 0.11 |" in text
    )


def test_the_hub_reads_the_figures_back() -> None:
    tasks = {"arc_easy": {"acc": 0.55, "stderr": 0.01, "n": 570}}
    data = ModelCard(card(quality=QUALITY, evaluations=[{**EVALUATION, "tasks": tasks}])).data
    assert (
        data.base_model == "org/name"
        and data.base_model_relation == "quantized"
        and data.pipeline_tag == "text-generation"
    )  # pyright: ignore
    assert {"leangrid", "quantized", "3-bit"} <= set(data.tags) and data.library_name == "transformers"  # pyright: ignore
    found = {(one.dataset_type, one.metric_type): one.metric_value for one in data.eval_results}  # pyright: ignore
    assert (
        found["wiki.txt", "perplexity"] == 28.94
        and found["wiki.txt", "kl_mean"] == 0.1171
        and found["c4", "kl_mean"] == 0.11
    )
    assert found["arc_easy", "acc"] == 0.55 and ("arc_easy", "n") not in found and ("arc_easy", "stderr") not in found
    assert not any(metric == "reference_perplexity" for _, metric in found)  # it is no figure of this model


def test_an_encoder_has_no_perplexity_and_another_task() -> None:
    data = ModelCard(card(quality={"measure": "cosine", "value": 0.01, "windows": 2, "tokens": 64})).data
    assert data.pipeline_tag == "feature-extraction"  # pyright: ignore
    assert [one.metric_type for one in data.eval_results] == ["embedding_cosine_mean"]  # pyright: ignore


@pytest.mark.parametrize(
    "source", ["org/name@v1", "./folder/model", "evil: [x\ny]|`<script>/name", 'a"b/c', "/", "x/\x00y", "---\nx: 1/b"]
)
def test_the_header_is_the_hubs_whatever_the_source_is_called(source: str) -> None:
    text = card(source, quality=QUALITY)
    data = ModelCard(text).data.to_dict()
    assert data["library_name"] == "transformers" and data["tags"][0] == "leangrid"
    assert data.get("base_model") == {"org/name@v1": "org/name"}.get(source)
    assert "<script>" not in text.split("\n---\n", 1)[1]


def test_a_gate_that_measured_nothing_gives_no_figures() -> None:
    text = card(quality={"error": "the result's predictions are not finite", "measure": "kl", "value": None})
    assert "## Measured" not in text and ModelCard(text).data.eval_results is None


@pytest.mark.fault("O10")
def test_a_card_that_cannot_be_written_does_not_fail_the_run(caplog: pytest.LogCaptureFixture) -> None:
    text = card(evaluations=[{**EVALUATION, "perplexity": "not a number"}])
    assert "records.jsonl" in text and "NU3" in text and "card could not be written" in caplog.text


def test_an_export_says_where_its_codes_come_from() -> None:
    changed = manifest(scheme="W4A16_G64")
    changed["result"] |= {"format": "gguf", "bits_per_weight": None}
    text = card(scheme="W4A16_G64", result=changed["result"], exported={"from": "out", "format": "compressed-tensors"})
    assert (
        "| container | gguf, exported from out, compressed-tensors |" in text
        and "llama-server -m DIR/model.gguf" in text
    )
    assert "bits per weight" not in text

"""report.html: whole in one file, whatever is missing, hostile, not finite, or very many."""

import math
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest
from report_facts import EVALUATION, QUALITY, RECORD, RUN_LOG, SAMPLE, facts

from leangrid.recipe import Recipe
from leangrid.report.facts import LossMap, place
from leangrid.report.page import render_page, toml
from leangrid.solve.rescue import Rescue

HOSTILE = "<script>alert(1)</script>\"'&<img src=x onerror=y>"
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Reader(HTMLParser):
    """Tags, addresses, visible text; complains about tags that are left open or closed twice."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.addresses: list[str] = []
        self.text = ""
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.addresses += [
            value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action", "srcset")
        ]
        assert not any(name.startswith("on") for name, _ in attrs), attrs
        self.open += [] if tag in VOID else [tag]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, (tag, self.open)

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def read(*arguments: Any, **more: Any) -> Reader:
    return Reader(render_page(facts(*arguments, **more)))


def words(reader: Reader) -> str:
    return " ".join(reader.text.split())


def test_it_has_every_part() -> None:
    text = words(read(evaluations=[EVALUATION]))
    for part in ("name, NU3", "100.0 MB of 400.0 MB: 25.0%", "3.12 bits", "0.117 nats", "87.0%", "28.94",
                 "12 windows of 1024 tokens of wiki.txt", "the first 2 calibration windows", "1 of 1 layers",
                 "sweep and refit", "3 min 20 s", "1.3 GB of memory at most",
                 "None: every layer was quantized as asked", "Input columns that calibration", "vllm serve DIR",
                 "leangrid quantize org/name OUT --recipe recipe.toml", 'scheme = "NU3"', "Row 3 of"):  # fmt: skip
        assert part in text, part


@pytest.mark.parametrize(
    ("scheme", "word", "said"),
    [("W4A16_G64", "yes", False), ("W4A16_G64", "no: it has no place for packed experts", True), ("NU3", "yes", False)],
)
def test_a_server_that_nobody_tried_is_named_as_one(scheme: str, word: str, said: bool) -> None:
    found = words(read(scheme=scheme, opened_in={"leangrid.load": "yes", "transformers": word}))
    assert "vllm serve DIR" in found
    assert ("not tried with results that transformers does not open by itself" in found) is said


def test_it_asks_for_nothing_and_runs_nothing() -> None:
    for reader in (read(), read(HOSTILE, evaluations=[{**EVALUATION, "text": HOSTILE}])):
        assert reader.addresses == ["data:,"] and not reader.tags["script"] and not reader.tags["img"]
        assert reader.tags["main"] == reader.tags["h1"] == 1
    text = render_page(facts())
    assert (
        "default-src 'none'" in text
        and "url(" not in text
        and "@import" not in text
        and "prefers-color-scheme: dark" in text
    )


def test_names_of_strangers_are_text() -> None:
    rescue = Rescue("damping", HOSTILE)
    quality = {**QUALITY, "worst_layers": [{"name": HOSTILE, "error": 0.5}]}
    reader = read(
        HOSTILE,
        records=[replace(RECORD, name=f"a.0.{HOSTILE}", rescues=(rescue,))],
        quality=quality,
        memory=[HOSTILE],
        run={**RUN_LOG, "sample": {**SAMPLE, "name": HOSTILE}},
        devices=[HOSTILE],
        evaluations=[{**EVALUATION, "text": HOSTILE, "tasks": {HOSTILE: {"acc": 0.5}}}],
    )
    assert not reader.tags["script"] and not reader.tags["img"]
    assert reader.text.count("<script>alert(1)</script>") >= 6


@pytest.mark.parametrize(
    "more",
    [
        {"run": {}},
        {"quality": {}},
        {"quality": {"error": "the result cannot be opened again"}},
        {"quality": {"measure": "cosine", "value": 0.01, "windows": 2, "tokens": 64}},
        {"records": []},
        {"run": {**RUN_LOG, "sample": None}},
        {"run": {**RUN_LOG, "blocks": RUN_LOG["blocks"][:1], "seconds": {"total": 0.0}}},
        {"scheme": "W4A16_G64"},
        {"scheme": "GPTQ4"},
        {"scheme": "Q4_K"},
        {"exported": {"from": "out", "format": "lut"}},
        {"records": [replace(RECORD, name="head")]},
        {
            "run": {
                **RUN_LOG,
                "sample": {**SAMPLE, "costs": [0.0, 0.0, 0.0], "weights": [0.0, 0.0, 0.0], "levels": [0.0]},
            }
        },
    ],
)
def test_parts_may_be_missing(more: dict[str, Any]) -> None:
    text = words(read(**more))
    assert (
        "nan" not in text.lower().split()
        and "None" not in text.replace("None: every layer", "")
        and "inf" not in text.split()
    )
    assert ("The quality gate failed" in text) == ("error" in more.get("quality", {}))
    assert ("Nothing was measured" in text) == (more.get("quality") == {})


def test_an_encoder_shows_its_cosine() -> None:
    text = words(read(quality={"measure": "cosine", "value": 0.0123, "windows": 2, "tokens": 64}))
    assert "0.0123 1 − cosine" in text and "Perplexity" not in text


def test_a_loss_that_is_no_number_is_said_and_breaks_nothing() -> None:
    bad = replace(RECORD, name="model.layers.1.mlp.down_proj", loss=math.nan, loss_minmax=math.inf)
    reader = read(records=[RECORD, bad])
    assert "not finite" in reader.text and 'class="n"><title>' in render_page(facts(records=[RECORD, bad]))
    assert "0 of 1 layers" not in reader.text and "1 of 2 layers" in words(reader)


def test_a_thousand_layers_stay_small() -> None:
    records = [replace(RECORD, name=f"model.layers.{block}.mlp.{name}_proj", loss=1.0 + block)
               for block in range(250) for name in ("gate", "up", "down", "o")]  # fmt: skip
    text = render_page(facts(records=records))
    Reader(text)
    assert len(text) < 700_000 and text.count("<rect") > 4000


def test_experts_share_a_cell() -> None:
    records = [replace(RECORD, name=f"model.layers.2.mlp.experts.{expert}.up_proj") for expert in range(64)]
    found = LossMap.of(records)
    assert found.linears == ["up_proj"] and found.blocks == ["2"] and found.losses == [[(64.0, 160.0, 256.0)]]
    assert place("model.layers.2.mlp.experts.5.up_proj") == ("2", "mlp.experts.*.up_proj") and place("head") == (
        "",
        "head",
    )
    both = [replace(RECORD, name=f"encoder.layer.0.{part}.dense") for part in ("attention.output", "output")]
    assert LossMap.of(both).linears == ["attention.output.dense", "output.dense"]


def test_rescues_are_told_in_words() -> None:
    many = [
        replace(RECORD, name=f"model.layers.{i}.x", rescues=(Rescue("damping", "0.1 instead of 0.01"),))
        for i in range(30)
    ]
    text = words(read(records=many))
    assert "More damping than asked before the Hessian could be factored: 30 times." in text and "and 18 more" in text
    assert "None: every layer" not in text


@pytest.mark.parametrize(
    "more", [{}, {"scheme": "W4A16_G64", "layers": {'re:.*"down"_proj': "W8A16", "é.x": "W3A16"}, "p": None}]
)
def test_the_recipe_comes_back_from_its_text(more: dict[str, Any], tmp_path: Any) -> None:
    recipe = Recipe(calibration='C:\\text "é".txt', **more).resolved("W4A16")
    (tmp_path / "recipe.toml").write_text(toml(recipe), encoding="utf-8")
    assert Recipe.from_file(tmp_path / "recipe.toml") == recipe


def test_every_svg_is_named_or_hidden() -> None:
    for tag in re.findall(r"<svg[^>]*>", render_page(facts())):
        assert 'aria-hidden="true"' in tag or ('role="img"' in tag and 'aria-label="' in tag), tag

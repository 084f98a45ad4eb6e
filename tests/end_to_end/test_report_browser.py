"""The pages in a real browser: nothing overflows, nothing is asked for, nothing complains, and both colour schemes are
ones."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from browser import NAMES, Browser, browser, find
from report_facts import EVALUATION, RECORD, RUN_LOG, SAMPLE, directory, facts

from leangrid.evaluation.compare import compare
from leangrid.report.page import render_page
from leangrid.solve.rescue import Rescue

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find() is None, reason=f"no browser here: none of {', '.join(NAMES)}, no $CHROMIUM"),
]
WIDTHS = (1280, 390)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser(find() or "") as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A full report, one with nothing in it, one whose every name is long, and a comparison."""
    folder = tmp_path_factory.mktemp("pages")
    records = [replace(RECORD, name=f"model.layers.{block}.mlp.{name}_proj", loss=1.0 + block) for block in range(30)
               for name in ("gate", "up", "down")]  # fmt: skip
    long = "a_very_long_name_without_any_place_to_break_" * 8
    hostile = [replace(RECORD, name=f"model.layers.0.{long}", loss=1e30, rescues=(Rescue("damping", long),))]
    evaluation = {
        **EVALUATION,
        "text": long,
        "kl_p99": 1.25,
        "tasks": {long: {"acc": 0.5, "stderr": 0.01, "n": 123456}},
    }
    run = {**RUN_LOG, "sample": {**SAMPLE, "name": long}}
    made = {
        "full": render_page(facts(records=records, evaluations=[EVALUATION])),
        "empty": render_page(facts(records=[], run={}, quality={})),
        "long": render_page(facts(f"org/{long}", records=hostile, evaluations=[evaluation], run=run, memory=[long])),
    }
    for name, text in made.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    results = [directory(folder / f"out{number}", 100 + number) for number in range(4)]
    compare(results, plot=folder / "compare.html")
    return {path.stem: path for path in folder.glob("*.html")}


@pytest.mark.parametrize("name", ["full", "empty", "long", "compare"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dark", [False, True])
def test_a_page_in_a_browser(name: str, width: int, dark: bool, chromium: Browser, pages: dict[str, Path]) -> None:
    address = pages[name].as_uri()
    chromium.open(address, width, dark)
    assert chromium.requests == [address] and chromium.complaints == []
    assert chromium.value("document.documentElement.scrollWidth") <= width, "it overflows to the side"
    wide = """[...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1
              && !e.closest('.scroll, pre, svg, .plot')).map(e => e.outerHTML.slice(0, 90))"""
    assert chromium.value(wide) == []
    paper, ink = (chromium.value(f"getComputedStyle(document.body).{name}") for name in ("backgroundColor", "color"))
    assert (brightness(paper) < brightness(ink)) == dark and abs(brightness(paper) - brightness(ink)) > 150
    narrow = (
        "[...document.querySelectorAll('td, th')].filter(e => e.textContent.length > 20 && e.clientWidth < 60).length"
    )
    assert chromium.value(narrow) == 0, "a cell is a column of letters"


def test_text_keeps_its_size_on_a_phone_and_stands_out(chromium: Browser, pages: dict[str, Path]) -> None:
    chromium.open(pages["full"].as_uri(), 390)
    smallest = """Math.min(...[...document.querySelectorAll('main *:not(sup):not(sub)')]
                  .filter(e => e.textContent.trim()).map(e => parseFloat(getComputedStyle(e).fontSize)))"""
    assert chromium.value(smallest) >= 12
    for dark in (False, True):
        chromium.open(pages["full"].as_uri(), 390, dark)
        colours = (
            "['.soft', 'figcaption', 'th', 'summary', 'td'].map(s => getComputedStyle(document.querySelector(s)).color)"
        )
        paper = chromium.value("getComputedStyle(document.body).backgroundColor")
        assert all(contrast(colour, paper) >= 4.5 for colour in chromium.value(colours)), "WCAG AA"


def test_a_broken_page_is_noticed(chromium: Browser, tmp_path: Path) -> None:
    """The checks above can fail: a page that is too wide, asks for a file and logs an error."""
    text = (
        '<!doctype html><body><div style="width:900px">x</div><img src="absent.png">'
        '<script>console.error("no")</script>'
    )
    (tmp_path / "bad.html").write_text(text)
    chromium.open((tmp_path / "bad.html").as_uri(), 390)
    assert len(chromium.requests) == 2 and chromium.complaints
    assert chromium.value("document.documentElement.scrollWidth") > 390


@pytest.mark.parametrize("width", WIDTHS)
def test_screenshots_can_be_taken(width: int, chromium: Browser, pages: dict[str, Path], tmp_path: Path) -> None:
    chromium.open(pages["full"].as_uri(), width)
    chromium.screenshot(tmp_path / "shot.png", 1000)
    data = (tmp_path / "shot.png").read_bytes()
    assert data.startswith(b"\x89PNG") and int.from_bytes(data[16:20]) == width and len(data) > 10_000
    shutil.rmtree(tmp_path, ignore_errors=True)


def numbers(colour: str) -> list[float]:
    return [float(part) for part in colour.partition("(")[2].rstrip(")").split(",")[:3]]


def brightness(colour: str) -> float:
    return sum(numbers(colour)) / 3


def contrast(one: str, other: str) -> float:
    """WCAG 2 contrast ratio of two sRGB colours."""
    light = []
    for colour in (one, other):
        parts = [value / 255 for value in numbers(colour)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        light.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(light) + 0.05) / (min(light) + 0.05)

"""What is made of a result's facts: the model card and the page. quantize writes both; ``report`` and ``eval --keep``
write them again."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from leangrid.report.card import model_card
from leangrid.report.facts import RECORDS, RUN, Facts
from leangrid.report.page import page
from leangrid.report.records import LayerRecord
from leangrid.report.strict_json import strict
from leangrid.storage.writer import MANIFEST, amend, require_sound

log = logging.getLogger("leangrid")

CARD, PAGE = "README.md", "report.html"
TIMED = frozenset({MANIFEST, RECORDS, RUN, PAGE})  # hold seconds, or the hash of a file that does


def views(manifest: Mapping[str, Any], records: Sequence[LayerRecord], run: Mapping[str, Any]) -> dict[str, str]:
    """README.md and report.html of a result. They never fail a run: what cannot be written says so."""
    facts = Facts(manifest, records, run)
    try:
        shown = page(facts)
    except Exception as error:  # hours of work do not end at a picture
        log.warning("the report could not be written: %s: %s", type(error).__name__, error)
        shown = '<!doctype html><meta charset="utf-8"><title>leangrid</title>The figures are in records.jsonl and manifest.json.\n'
    return {CARD: model_card(facts), PAGE: shown}


def rewrite(directory: Path) -> Path:
    """Write ``directory``/report.html again from what the directory holds, and return its path.

    Raises:
        VerifyError: the directory differs from its manifest in anything but the report itself; nothing was written.
    """
    require_sound(directory, but=PAGE)
    amend(directory, {PAGE: page(Facts.read(directory)).encode()})
    return directory / PAGE


def keep(directory: Path, evaluation: Mapping[str, Any]) -> None:
    """Add what ``eval`` measured to a result: its manifest, model card and report. The same measurement again replaces
    the older one."""
    facts = Facts.read(directory)
    mine = strict(dict(evaluation))
    others = [kept for kept in facts.evaluations if _what(kept) != _what(mine)]
    added = {"evaluations": [*others, mine]}
    told = views({**facts.manifest, **added}, facts.records, facts.run)
    amend(directory, {name: text.encode() for name, text in told.items()}, added)


def _what(evaluation: Mapping[str, Any]) -> tuple[Any, ...]:
    """What makes two evaluations the same one, measured twice: the text, its windows, the reference, and which
    tasks."""
    keys = ("text", "sha256_of_text", "length", "windows", "reference")
    return (*(evaluation.get(key) for key in keys), sorted(evaluation.get("tasks") or {}))

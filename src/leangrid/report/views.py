"""The model card and the report page of a result. quantize writes both; ``report`` and ``eval --keep`` write them
again."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from leangrid.report.card import render_card
from leangrid.report.facts import RECORDS, RUN, Facts
from leangrid.report.page import render_page
from leangrid.report.records import LayerRecord
from leangrid.report.strict_json import strict
from leangrid.storage.manifest import MANIFEST, amend_result, require_unchanged

log = logging.getLogger("leangrid")

CARD, PAGE = "README.md", "report.html"
# Files that hold seconds, or the hash of a file that does: they differ between two runs that are otherwise equal.
TIMED = frozenset({MANIFEST, RECORDS, RUN, PAGE})


def render_views(manifest: Mapping[str, Any], records: Sequence[LayerRecord], run: Mapping[str, Any]) -> dict[str, str]:
    """The text of README.md and report.html, by file name.

    An error in rendering does not end a run that took hours: it is logged, and the file says where the figures are."""
    facts = Facts(manifest, records, run)
    try:
        shown = render_page(facts)
    except Exception as error:
        log.warning("the report could not be written: %s: %s", type(error).__name__, error)
        said = "The figures are in records.jsonl and manifest.json.\n"
        shown = f'<!doctype html><meta charset="utf-8"><title>leangrid</title>{said}'
    return {CARD: render_card(facts), PAGE: shown}


def rewrite_report(directory: Path) -> Path:
    """Write ``directory``/report.html again from what the directory holds, and return its path.

    Raises:
        VerifyError: the directory differs from its manifest in anything but the report itself; nothing was written.
    """
    require_unchanged(directory, but=PAGE)
    amend_result(directory, {PAGE: render_page(Facts.read(directory)).encode()})
    return directory / PAGE


def add_evaluation(directory: Path, evaluation: Mapping[str, Any]) -> None:
    """Add an evaluation (``Evaluation.to_dict()``) to the manifest, model card and report of a result. One of the same
    text, windows, reference and tasks replaces the earlier one."""
    facts = Facts.read(directory)
    mine = strict(dict(evaluation))
    others = [other for other in facts.evaluations if _identity(other) != _identity(mine)]
    added = {"evaluations": [*others, mine]}
    texts = render_views({**facts.manifest, **added}, facts.records, facts.run)
    amend_result(directory, {name: text.encode() for name, text in texts.items()}, added)


def _identity(evaluation: Mapping[str, Any]) -> tuple[Any, ...]:
    """What is equal in two evaluations that measured the same: text, windows, reference and names of the tasks."""
    keys = ("text", "sha256_of_text", "length", "windows", "reference")
    return (*(evaluation.get(key) for key in keys), sorted(evaluation.get("tasks") or {}))

"""Several results side by side: one table, and size against distance from the original with the front that no other
beats."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from leangrid.errors import OutputError, RecipeError
from leangrid.evaluation import evaluate_many
from leangrid.progress import Progress
from leangrid.report.comparison import comparison_page
from leangrid.report.facts import Facts
from leangrid.report.plots import pareto
from leangrid.report.strict_json import strict
from leangrid.storage import files
from leangrid.storage.writer import require_sound

MEASURES = ("perplexity", "kl_mean", "kl_p99", "top1_agreement", "embedding_cosine_mean")
_SAME = ("text", "sha256_of_text", "length", "windows")  # what two evaluations must share to stand beside each other


def compare(
    directories: Sequence[str | Path],
    reference: str | Path | None = None,
    text: str = "wikitext2",
    *,
    length: int | None = None,
    windows: int = 12,
    plot: str | Path | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
    text_field: str | None = None,
) -> dict[str, Any]:
    """The JSON of ``leangrid compare``.

    With ``reference`` all are measured on ``text``. Without, the figures are those that ``eval --keep`` left, where all
    share one evaluation, else those of the quality gate; of two results calibrated on different windows the latter are
    not comparable, and it is said.

    Args:
        directories: finished results.
        text_field: the column of the text's rows; None: text, or conversations.
        plot: an .html file to write.

    Returns:
        ``rows``, one a directory in the order given: name, scheme, format, bits_per_weight, bytes (of the weights),
        loss, loss_minmax, loss_rounding, seconds, the measures of ``evaluate`` or None, and ``front``: whether no other
        is both smaller and nearer. ``measured_on``: a sentence; ``reference_perplexity``; ``plot``.

    Raises:
        VerifyError: a directory that is not what its manifest says. OutputError: ``plot`` cannot be written. Both
        before any work.
    """
    paths = [Path(directory) for directory in directories]
    if len(set(paths)) < len(paths):
        raise RecipeError("a directory is named twice", "compare", "Name each once")
    if plot is not None:
        _check_plot(Path(plot))
    for path in paths:
        require_sound(path)
    facts = [Facts.read(path) for path in paths]
    if reference is not None:
        found = evaluate_many(paths, reference, text, length=length, windows=windows, device=device, progress=progress,
                              text_field=text_field)  # fmt: skip
        measured_on = _words(found[0])
    else:
        found, measured_on = _kept(facts)
    rows = [_row(path, fact, figures) for path, fact, figures in zip(paths, facts, found, strict=True)]
    front = pareto([(row["bytes"], _distance(row)) for row in rows])
    rows = [{**row, "front": index in front} for index, row in enumerate(rows)]
    originals = {figures.get("reference_perplexity") for figures in found}
    result = strict({
        "rows": rows,
        "measured_on": measured_on,
        "reference": None if reference is None else str(reference),
        "reference_perplexity": originals.pop() if len(originals) == 1 else None,
        "plot": None if plot is None else str(plot),
    })  # fmt: skip
    if plot is not None:
        files.atomic_write(Path(plot), comparison_page(result).encode())
    return result


def _row(path: Path, facts: Facts, figures: dict[str, Any]) -> dict[str, Any]:
    made = facts.result
    named = {key: made.get(key) for key in ("scheme", "format", "bits_per_weight")}
    losses = {key: made.get(key) for key in ("loss", "loss_minmax", "loss_rounding")}
    seconds = (facts.run.get("seconds") or {}).get("total")
    measured = {key: figures.get(key) for key in MEASURES}
    return {
        "name": path.name or str(path),
        **named,
        "bytes": facts.bytes_after,
        **losses,
        **measured,
        "seconds": seconds,
    }


def _distance(row: dict[str, Any]) -> float:
    """From the original: KL, or an encoder's 1 - cosine."""
    value = row["kl_mean"] if row["kl_mean"] is not None else row["embedding_cosine_mean"]
    return float("nan") if value is None else value


def _kept(facts: Sequence[Facts]) -> tuple[list[dict[str, Any]], str]:
    """What was measured before: the newest evaluation that all share, else what their gates found."""
    for candidate in reversed(facts[0].evaluations):
        alike = [
            [one for one in fact.evaluations if all(one.get(key) == candidate.get(key) for key in _SAME)]
            for fact in facts
        ]
        if all(alike):
            return [dict(found[-1]) for found in alike], _words(candidate)
    gates = [fact.quality for fact in facts]
    figures = [
        {**gate, ("embedding_cosine_mean" if gate.get("measure") == "cosine" else "kl_mean"): gate.get("value")}
        for gate in gates
    ]
    if not any("value" in gate for gate in gates):
        return figures, "nowhere: give --reference, or run leangrid eval DIR --reference SOURCE --keep for each"
    if len({fact.result.get("windows_sha256") for fact in facts}) == 1:
        return figures, "by the quality gate of each run, on the first calibration windows"
    what = (
        "by the quality gate of each run, on DIFFERENT calibration windows: give --reference to measure all on one text"
    )
    return figures, what


def _words(found: Mapping[str, Any]) -> str:
    name = str(found.get("text", "")).replace("\\", "/").rsplit("/", 1)[-1]
    return f"on {found.get('windows')} windows of {found.get('length')} tokens of {name}"


def _check_plot(path: Path) -> None:
    if path.suffix.lower() not in (".html", ".htm"):
        raise OutputError("the plot is an HTML page", path, "Give a name such as compare.html")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise OutputError("the plot cannot be written there", path, "Give a file in a directory that exists")

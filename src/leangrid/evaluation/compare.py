"""Several results side by side: one table, and the front of those that no other beats in size and distance."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from leangrid.errors import OutputError, RecipeError
from leangrid.evaluation.measure import evaluate_many
from leangrid.evaluation.results import ComparedResult, Comparison
from leangrid.evaluation.windows import WINDOWS
from leangrid.progress import Progress
from leangrid.report.comparison import render_comparison
from leangrid.report.facts import Facts
from leangrid.report.plots import pareto
from leangrid.report.strict_json import strict
from leangrid.storage import files
from leangrid.storage.manifest import require_unchanged

_RECORDED = ("scheme", "format", "bits_per_weight", "loss", "loss_minmax", "loss_rounding")
_MEASURED = ("perplexity", "kl_mean", "kl_p99", "top1_agreement", "embedding_cosine_mean")
_SAME = ("text", "sha256_of_text", "length", "windows")  # what two evaluations must share to be comparable


def compare(
    directories: Sequence[str | Path],
    reference: str | Path | None = None,
    text: str = "wikitext2",
    *,
    length: int | None = None,
    windows: int = WINDOWS,
    plot: str | Path | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
    text_field: str | None = None,
) -> Comparison:
    """Put finished results side by side: size, losses, distance from the original, time.

    With ``reference`` all of them are measured on ``text``. Without it nothing is run: the figures are those of the
    newest evaluation that all results have in common (``eval --keep``), else those of their quality gates. The gates of
    two results that were calibrated on different windows are not comparable, which ``measured_on`` then says.

    Args:
        directories: finished results, each named once.
        reference: the original, as in ``evaluate``; None: nothing is measured.
        text, length, windows, device, text_field: as in ``evaluate``.
        plot: an .html file to write, with the table and a figure of size against distance; None: none.
        progress: is called with an Event after every window.

    Returns:
        One row for each directory; ``to_dict()`` gives them under the keys of ``leangrid compare --json``.

    Raises:
        VerifyError: a directory that is not what its manifest says. OutputError: ``plot`` cannot be written.
            RecipeError: a directory is named twice. All before any work.

    Example:
        >>> found = leangrid.compare(["out"])
        >>> found.rows[0].name, found.rows[0].scheme, found.rows[0].front
        ('out', 'NU4', True)
    """
    paths = [Path(directory) for directory in directories]
    facts = _read_facts(paths, None if plot is None else Path(plot))
    if reference is None:
        figures, measured_on = _recorded_figures(facts)
    else:
        found = evaluate_many(paths, reference, text, length=length, windows=windows, device=device, progress=progress,
                              text_field=text_field)  # fmt: skip
        figures = [evaluation.to_dict() for evaluation in found]
        measured_on = _describe_text(figures[0])
    originals = {strict(one.get("reference_perplexity")) for one in figures}
    result = Comparison(
        rows=_mark_front([_row(*each) for each in zip(paths, facts, figures, strict=True)]),
        measured_on=measured_on,
        reference=None if reference is None else str(reference),
        reference_perplexity=originals.pop() if len(originals) == 1 else None,
        plot=None if plot is None else str(plot),
    )
    if plot is not None:
        files.atomic_write(Path(plot), render_comparison(result.to_dict()).encode())
    return result


def _read_facts(paths: Sequence[Path], plot: Path | None) -> list[Facts]:
    """What is known of each result, after all that ``compare`` refuses was looked at."""
    if len(set(paths)) < len(paths):
        raise RecipeError("a directory is named twice", "compare", "Name each once")
    if plot is not None:
        _check_plot(plot)
    for path in paths:
        require_unchanged(path)
    return [Facts.read(path) for path in paths]


def _row(path: Path, facts: Facts, figures: Mapping[str, Any]) -> ComparedResult:
    """One result; numbers that are not finite become None, as in JSON."""
    return ComparedResult(
        name=path.name or str(path),
        bytes=facts.bytes_after,
        seconds=strict((facts.run.get("seconds") or {}).get("total")),
        **{key: strict(facts.result.get(key)) for key in _RECORDED},
        **{key: strict(figures.get(key)) for key in _MEASURED},
    )


def _mark_front(rows: list[ComparedResult]) -> list[ComparedResult]:
    """The rows, with ``front`` set for those that no other beats."""
    distances = (float("nan") if row.distance is None else row.distance for row in rows)
    front = pareto([(row.bytes, distance) for row, distance in zip(rows, distances, strict=True)])
    return [replace(row, front=index in front) for index, row in enumerate(rows)]


def _recorded_figures(facts: Sequence[Facts]) -> tuple[list[dict[str, Any]], str]:
    """What was measured earlier, and on what: the newest evaluation that all results have in common, else what their
    quality gates found."""
    for candidate in reversed(facts[0].evaluations):
        alike = [
            [one for one in fact.evaluations if all(one.get(key) == candidate.get(key) for key in _SAME)]
            for fact in facts
        ]
        if all(alike):
            return [dict(found[-1]) for found in alike], _describe_text(candidate)
    gates = [fact.quality for fact in facts]
    figures = [
        {**gate, ("embedding_cosine_mean" if gate.get("measure") == "cosine" else "kl_mean"): gate.get("value")}
        for gate in gates
    ]
    if not any("value" in gate for gate in gates):
        return figures, "nowhere: give --reference, or run leangrid eval DIR --reference SOURCE --keep for each"
    if len({fact.result.get("windows_sha256") for fact in facts}) == 1:
        return figures, "by the quality gate of each run, on the first calibration windows"
    way_out = "give --reference to measure all on one text"
    return figures, f"by the quality gate of each run, on DIFFERENT calibration windows: {way_out}"


def _describe_text(found: Mapping[str, Any]) -> str:
    name = str(found.get("text", "")).replace("\\", "/").rsplit("/", 1)[-1]
    return f"on {found.get('windows')} windows of {found.get('length')} tokens of {name}"


def _check_plot(path: Path) -> None:
    if path.suffix.lower() not in (".html", ".htm"):
        raise OutputError("the plot is an HTML page", path, "Give a name such as compare.html")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise OutputError("the plot cannot be written there", path, "Give a file in a directory that exists")

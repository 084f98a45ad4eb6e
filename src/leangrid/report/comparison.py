"""The page of ``leangrid compare``: a table, and size against distance with the front that no other result beats."""

from collections.abc import Mapping
from typing import Any

from leangrid.report.facts import finite
from leangrid.report.page import template
from leangrid.report.plots import Axis, dots, stairs


def comparison_page(result: Mapping[str, Any]) -> str:
    """The whole file, from the JSON of ``compare``."""
    rows = [{**row, "number": number} for number, row in enumerate(result["rows"], 1)]
    cosine = not any(finite(row["kl_mean"]) for row in rows) and any(
        finite(row["embedding_cosine_mean"]) for row in rows
    )
    measure = "embedding_cosine_mean" if cosine else "kl_mean"
    shown = [row for row in rows if finite(row[measure])]
    return template("compare.html.jinja").render(
        result=result,
        rows=rows,
        measure=measure,
        axis="1 − cosine" if cosine else "KL mean, nats",
        plot=_plot(shown, measure),
    )


def _plot(rows: list[dict[str, Any]], measure: str) -> dict[str, Any] | None:
    """Dots, the steps of the front, and where each number stands; None where nothing was measured."""
    if not rows:
        return None
    x = Axis.linear([row["bytes"] for row in rows], count=6)
    y = (
        Axis.logarithmic([row[measure] for row in rows])
        if all(row[measure] > 0 for row in rows)
        else Axis.linear([row[measure] for row in rows])
    )
    front = sorted((row["bytes"], row[measure]) for row in rows if row["front"])
    marks = [{"left": x.at(row["bytes"]), "top": y.down(row[measure]), "number": row["number"]} for row in rows]
    return {
        "x": x,
        "y": y,
        "front": stairs(front, x, y),
        "on": dots([(row["bytes"], row[measure]) for row in rows if row["front"]], x, y),
        "off": dots([(row["bytes"], row[measure]) for row in rows if not row["front"]], x, y),
        "marks": marks,
        "summary": f"{len(rows)} results by size and distance from the original, {len(front)} of them on the front; in numbers below",
    }

"""The page of ``leangrid compare``: a table, and a plot of size against distance with the front of the best results."""

from collections.abc import Mapping
from typing import Any

from leangrid.report.facts import finite
from leangrid.report.page import load_template
from leangrid.report.plots import Axis, dots, stairs


def render_comparison(result: Mapping[str, Any]) -> str:
    """The text of the HTML file, from ``Comparison.to_dict()``."""
    rows = [{**row, "number": number} for number, row in enumerate(result["rows"], 1)]
    cosine = not any(finite(row["kl_mean"]) for row in rows) and any(
        finite(row["embedding_cosine_mean"]) for row in rows
    )
    measure = "embedding_cosine_mean" if cosine else "kl_mean"
    shown = [row for row in rows if finite(row[measure])]
    return load_template("compare.html.jinja").render(
        result=result,
        rows=rows,
        measure=measure,
        axis="1 − cosine" if cosine else "KL mean, nats",
        plot=_plot(shown, measure),
    )


def _plot(rows: list[dict[str, Any]], measure: str) -> dict[str, Any] | None:
    """The paths of the plot and the places of its labels; None where nothing was measured."""
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
        "summary": f"{len(rows)} results by size and distance from the original, "
        f"{len(front)} of them on the front; in numbers below",
    }

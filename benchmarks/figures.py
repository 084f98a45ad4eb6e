"""Draws docs/figures from results: one SVG for each variable of scaling.py, and what effort gives and takes, from
quality.py. The same bytes for the same lines.

    python benchmarks/figures.py [--results benchmarks/results] [--out docs/figures]

Of several base points in scaling's lines the largest is drawn.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from common import lines
from common.machine import ROOT

AXES = {
    "rows": "rows",
    "cols": "columns",
    "tokens": "calibration tokens",
    "steps": "steps T of the affine search",
    "bits": "bits",
    "group_size": "columns a group",
}
# One colour a stage in every figure (Okabe and Ito's, which colour-blind readers tell apart, and three more).
COLOURS = {"hessian": "#0072B2", "hessian bf16": "#6A3D9A", "factor": "#56B4E9", "affine": "#D55E00",
           "nonuniform": "#CC79A7", "sweep": "#009E73",
           "refine": "#E69F00", "refine levels": "#B8A200", "pack": "#999999", "linear": "#000000"}  # fmt: skip
EFFORTS = ("fast", "good", "best")
# Text stays text and ids come from a fixed seed: small files that change only where a number does.
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "leangrid",
    "font.size": 9,
    "font.family": "sans-serif",
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def draw(variable: str, found: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw seconds over the values of one variable, one line for each stage with its exponent, both axes
    logarithmic."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 3.4), layout="constrained", facecolor="white")
        axes = figure.add_subplot()
        for line in found:
            label = f"{line['stage']}  {line['exponent']:.2f}"
            axes.plot(
                line["values"],
                line["seconds"],
                marker="o",
                markersize=3,
                linewidth=1.4,
                color=COLOURS[line["stage"]],
                label=label,
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        values = sorted({value for line in found for value in line["values"]})
        axes.xaxis.set_major_locator(FixedLocator(values))
        axes.xaxis.set_major_formatter(FixedFormatter([f"{value:,}" for value in values]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel(AXES[variable])
        axes.set_ylabel("CPU seconds, 1 thread")
        axes.legend(
            title="exponent", frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, title_fontsize=8
        )
        _save(figure, path)


def draw_efforts(found: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Draw how far a result is from the original over the seconds it took, by effort, both in units of ``fast``'s: one
    line for each model and scheme that quality.py measured with all three. Whether there was any."""
    measured: dict[str, dict[str, tuple[float, float]]] = {}
    for line in found:
        effort = {"default": "good"}.get(line.get("variant", ""), line.get("variant", ""))
        off = line.get("kl_mean", line.get("embedding_cosine_mean"))
        if line["benchmark"] == "quality" and effort in EFFORTS and off:
            measured.setdefault(f"{line['model']}  {line['scheme']}", {})[effort] = line["seconds"]["total"], off
    whole = {name: points for name, points in sorted(measured.items()) if len(points) == len(EFFORTS)}
    if not whole:
        return False
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.6, 3.4), layout="constrained", facecolor="white")
        axes = figure.add_subplot()
        for (name, points), colour in zip(whole.items(), list(COLOURS.values()), strict=False):
            seconds, off = points["fast"]
            x, y = [points[effort][0] / seconds for effort in EFFORTS], [points[effort][1] / off for effort in EFFORTS]
            axes.plot(x, y, marker="o", markersize=4, linewidth=1.4, color=colour, label=name)
            for effort, at in zip(EFFORTS, zip(x, y, strict=True), strict=True):
                axes.annotate(effort, at, textcoords="offset points", xytext=(4, 4), fontsize=7)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("seconds of the quantize call, of fast's")
        axes.set_ylabel("distance from the original, of fast's")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
        _save(figure, path)
    return True


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def all_figures(found: Sequence[Mapping[str, Any]], out: Path) -> list[Path]:
    """Draw one file for each variable that was measured, from the largest base point, and one of efforts,
    and return the paths."""
    scaling = [line for line in found if line["benchmark"] == "scaling"]
    if not scaling:
        raise SystemExit("no lines of scaling.py: python benchmarks/scaling.py --out benchmarks/results/scaling.jsonl")
    largest = max((line["base"] for line in scaling), key=lambda base: base["rows"] * base["cols"])
    paths = []
    for variable in AXES:
        chosen = [line for line in scaling if line["variable"] == variable and line["base"] == largest]
        if chosen:
            paths.append(out / f"scaling-{variable.replace('_', '-')}.svg")
            draw(variable, chosen, paths[-1])
    if draw_efforts(found, out / "effort.svg"):
        paths.append(out / "effort.svg")
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "figures")
    options = parser.parse_args()
    found = [line for name in ("scaling", "quality") for line in lines.read(options.results / f"{name}.jsonl")]
    for path in all_figures(found, options.out):
        print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()

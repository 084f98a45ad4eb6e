"""report.html of a result: one file that loads nothing else, for wide and narrow screens, light and dark.

This module chooses what is shown and computes every figure; the templates define how it looks. They escape every value,
because names of models and tensors come from files of others."""

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from leangrid.recipe import Recipe
from leangrid.report.card import describe_calibration, describe_scheme, measurements, task_figures
from leangrid.report.experts import expert_figures
from leangrid.report.facts import Facts, LossMap, finite, place
from leangrid.report.plots import RATIOS, Axis, Number, Shades, dots, line, ratio_step, strokes
from leangrid.report.records import LayerRecord
from leangrid.report.serving import NOT_LOADED, server, serving_key, snippet
from leangrid.report.units import format_duration, format_size
from leangrid.solve.rescue import KINDS, NOTES

_WORST = 8  # layers in the table
_TITLED = 3000  # cells of a heat map that carry their numbers
_DETAILS = 12  # sentences of one kind of rescue
_DECADES = 8  # of the costs in the figure of a row
_MEASURES = (
    ("perplexity", "perplexity"),
    ("reference_perplexity", "original's"),
    ("kl_mean", "KL mean, nats"),
    ("kl_p99", "KL p99, nats"),
    ("top1_agreement", "same token"),
    ("embedding_cosine_mean", "1 − cosine"),
)
_STAGES = {
    "load": "reading weights",
    "calibrate": "forward passes",
    "hessian": "Hessians: sums over tokens",
    "factor": "factoring, correction",
    "grid": "learning the grids",
    "solve": "sweep and refit",
    "baseline": "the two comparisons",
    "pack": "packing",
    "save": "writing",
    "check": "quality gate",
}


def render_page(facts: Facts) -> str:
    """The text of the HTML file."""
    recipe = facts.recipe
    losses, measured = LossMap.of(facts.records), _measured(facts)
    return load_template("page.html.jinja").render(
        facts=facts,
        recipe=recipe,
        scheme=describe_scheme(recipe),
        calibration=describe_calibration(recipe),
        sizes=_sizes(facts),
        measured=measured,
        measures=[(key, words) for key, words in _MEASURES if any(finite(row[key]) for row in measured)],
        gate=facts.quality,
        sums=_sums(facts),
        maps=_maps(losses),
        worst=[(*place(record.name), record) for record in _worst(facts.records)],
        blocks=_blocks(losses),
        sample=_sample(facts.run.get("sample"), recipe),
        experts=expert_figures(facts.records),
        stages=_stages(facts.run.get("seconds") or {}),
        memory=_memory(facts.run),
        rescues=_rescues(facts),
        opened=snippet(facts),
        served=server(facts),
        generates=serving_key(facts.container, facts.exported_from is not None) not in NOT_LOADED,
        command=f"leangrid quantize {shlex.quote(facts.source)} OUT --recipe recipe.toml",
        toml=toml(recipe),
    )


@cache
def load_template(name: str) -> Template:
    """One of the templates, with the filters that format numbers."""
    loader = PackageLoader("leangrid", "report/templates")
    made = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made.filters |= {"size": format_size, "duration": format_duration, "figure": figure, "share": share}
    made.globals |= {"number": _plain_number, "power": _power, "bytes": _round_size}
    made.tests["finite"] = finite
    return made.get_template(name)


def figure(value: Any, digits: int = 4) -> str:
    """A number with ``digits`` significant digits; a dash for None, "not finite" for NaN and infinities."""
    if value is None:
        return "–"
    if not finite(value):
        return "not finite"
    if 10**digits <= abs(value) < 1e9:
        return f"{round(value, digits - 1 - math.floor(math.log10(abs(value)))):,.0f}"
    return f"{value:,.{digits}g}"


def share(value: Any) -> str:
    """A share such as 0.123 as 12.3%."""
    return f"{value:.1%}" if finite(value) else figure(None)


def _plain_number(value: Number) -> str:
    """A tick of a linear axis."""
    return f"{value:.4g}".replace("-", "−") if abs(value) > 1e-12 else "0"


def _power(value: Number) -> str:
    """A tick of a logarithmic axis: 0.001, 10⁻⁶."""
    exponent = round(math.log10(value))
    if -3 <= exponent <= 3 or not math.isclose(value, 10.0**exponent):
        return f"{value:.4g}"
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _round_size(value: Number) -> str:
    return format_size(value).replace(".0 ", " ") if value else "0"


def toml(recipe: Recipe) -> str:
    """A recipe file that gives the same recipe again. JSON's strings, numbers and booleans are TOML's."""
    fields = {key: value for key, value in recipe.model_dump().items() if value is not None}
    layers = fields.pop("layers")
    lines = [f"{key} = {json.dumps(value)}" for key, value in fields.items()]
    table = [f"{json.dumps(key)} = {json.dumps(value)}" for key, value in layers.items()]
    return "\n".join(lines + (["", "[layers]", *table] if table else []))


def _sizes(facts: Facts) -> dict[str, Any]:
    before, after = facts.run.get("bytes_before"), facts.bytes_after
    bits = 8 * after / before if before else None
    return {
        "before": before,
        "after": after,
        "share": bits / 8 if bits else None,
        "bits": facts.result.get("bits_per_weight"),
    }


def _measured(facts: Facts) -> list[dict[str, Any]]:
    """Rows of the quality table; the tasks of each are rows below it."""
    keys = ("on", "seen", "tokens", *(key for key, _ in _MEASURES))
    rows = []
    for found in measurements(facts):
        tasks = [(name, metric, value, _stderr(found["tasks"][name], metric), found["tasks"][name].get("n"))
                 for name, metric, value in task_figures(found)]  # fmt: skip
        measured = any(finite(found.get(key)) for key, _ in _MEASURES)
        rows.append({key: found.get(key) for key in keys} | {"tasks": tasks, "measured": measured})
    return rows


def _stderr(figures: Mapping[str, Any], metric: str) -> Any:
    """The standard error of one figure of a task: ``stderr`` is that of its first."""
    return figures.get(f"{metric}_stderr", figures.get("stderr") if metric == next(iter(figures)) else None)


def _worst(records: Sequence[LayerRecord]) -> list[LayerRecord]:
    """The layers with the largest loss; one that is not finite counts as largest."""
    return sorted(records, key=lambda record: -record.loss if finite(record.loss) else -math.inf)[:_WORST]


def _sums(facts: Facts) -> dict[str, Any]:
    """The three losses summed over layers, in per cent of the largest, and in how many layers the result's is below
    min-max GPTQ's."""
    totals = {key: sum(getattr(r, key) for r in facts.records) for key in ("loss", "loss_minmax", "loss_rounding")}
    most = max((value for value in totals.values() if finite(value)), default=0.0) or 1.0
    bars = [
        (label, totals[key], 100 * totals[key] / most if finite(totals[key]) else 0.0)
        for label, key in (("this model", "loss"), ("min-max GPTQ", "loss_minmax"), ("rounding", "loss_rounding"))
    ]
    better = sum(record.loss < record.loss_minmax for record in facts.records)
    return {"bars": bars, "better": better, "layers": len(facts.records)}


def _maps(losses: LossMap) -> dict[str, Any]:
    """The heat maps: CSS classes of the cells, row by row, and the legend."""
    every = [value for row in losses.losses for cell in row if cell for value in cell]
    shades = Shades.over(every)
    titled = sum(len(row) for row in losses.losses) <= _TITLED

    def cells(which: int | None) -> list[list[tuple[str, str]]]:
        return [[_cell(cell, which, shades, _title(linear, block, cell) if titled else "")
                 for block, cell in zip(losses.blocks, row, strict=True)]
                for linear, row in zip(losses.linears, losses.losses, strict=True)]  # fmt: skip

    named = [("This model beside min-max GPTQ", "ratio", cells(None)), ("This model", "loss", cells(0)),
             ("Min-max GPTQ", "loss", cells(1)), ("Rounding", "loss", cells(2))]  # fmt: skip
    return {
        "linears": losses.linears,
        "blocks": losses.blocks,
        "named": named,
        "ratios": RATIOS,
        "shades": shades.edges,
    }


def _cell(cell: tuple[Number, Number, Number] | None, which: int | None, shades: Shades, title: str) -> tuple[str, str]:
    """(class, title) of one cell; class "" where there is no layer, "n" where the loss is not finite."""
    if cell is None:
        return "", ""
    step = ratio_step(cell[0], cell[1]) if which is None else shades.step(cell[which])
    return ("n" if step is None else f"{'r' if which is None else 's'}{step}"), title


def _title(linear: str, block: str, cell: tuple[Number, Number, Number] | None) -> str:
    where = f"block {block}, {linear}" if block else linear
    return (
        ""
        if cell is None
        else f"{where}: {figure(cell[0])}; min-max GPTQ {figure(cell[1])}; rounding {figure(cell[2])}"
    )


def _blocks(losses: LossMap) -> list[tuple[str, Number, Number, Number]]:
    """Sums over each block, as a table for readers who cannot see the maps."""
    rows = []
    for block, column in zip(losses.blocks, zip(*losses.losses, strict=True), strict=True):
        ours, minmax, rounding = (sum(cell[which] for cell in column if cell) for which in range(3))
        rows.append((block, ours, minmax, rounding))
    return rows


def _sample(sample: Mapping[str, Any] | None, recipe: Recipe) -> dict[str, Any] | None:
    """The paths of the figure of one row; None where the run took no sample."""
    if sample is None:
        return None
    x = Axis.linear([*sample["weights"], *sample["levels"], *sample["levels_minmax"]], count=8)
    y = Axis.logarithmic(sample["costs"], _DECADES)
    first, last, count = sample["columns"]
    return {
        "name": sample["name"],
        "row": sample["row"],
        "p": sample["p"],
        "columns": f"columns {first} to {last}",
        "shown": len(sample["weights"]),
        "count": count,
        "x": x,
        "y": y,
        "points": dots(zip(sample["weights"], sample["costs"], strict=True), x, y),
        "levels": strokes(sample["levels"], x),
        "minmax": strokes(sample["levels_minmax"], x),
        "numbers": (len(sample["levels"]), len(sample["levels_minmax"])),
        "learned": recipe.parsed.method == "leanquant",
        "errors": _weighted_errors(sample),
    }


def _weighted_errors(sample: Mapping[str, Any]) -> tuple[Number, Number]:
    """Mean squared distance of the shown weights to the nearest level, weighted by cost: learned levels, min-max
    levels."""

    def mean(levels: Sequence[Number]) -> Number:
        pairs = list(zip(sample["weights"], sample["costs"], strict=True))
        total = sum(cost * min((weight - level) ** 2 for level in levels) for weight, cost in pairs)
        return total / (sum(cost for _, cost in pairs) or 1.0)

    return mean(sample["levels"]), mean(sample["levels_minmax"])


def _stages(seconds: Mapping[str, Number]) -> dict[str, Any] | None:
    """Time by stage: words, seconds, share of the total, per cent of the longest; "the rest" is outside all stages.
    None where the run has no times."""
    total = seconds.get("total")
    if not total:
        return None
    order = [*_STAGES, *(name for name in seconds if name not in _STAGES)]
    rows = [
        (_STAGES.get(name, name), seconds[name]) for name in order if name != "total" and seconds.get(name, 0.0) > 0
    ]
    rest = total - sum(value for _, value in rows)
    rows += [("the rest", rest)] if rest > 0.005 * total else []
    most = max(value for _, value in rows)
    return {"total": total, "rows": [(words, value, value / total, 100 * value / most) for words, value in rows]}


def _memory(run: Mapping[str, Any]) -> dict[str, Any] | None:
    """Lines of memory over time, by block; None where the run recorded none."""
    blocks = run.get("blocks") or []
    if not blocks:
        return None
    ends, elapsed = [], 0.0
    for block in blocks:
        elapsed += block["seconds"]
        ends.append(elapsed)
    kinds = [("resident, at its fullest in each block", "resident_bytes", "a"), ("peak so far", "peak_ram_bytes", "b"),
             ("GPU peak so far", "peak_gpu_bytes", "c")]  # fmt: skip
    drawn = [
        (label, [block[key] for block in blocks], style)
        for label, key, style in kinds
        if any(block[key] for block in blocks)
    ]
    unit, word = (60.0, "minutes") if ends[-1] >= 180 else (1.0, "seconds")
    x = Axis.linear([0.0, *(end / unit for end in ends)], zero=True)
    y = Axis.linear([value for _, values, _ in drawn for value in values], zero=True, count=4)
    lines = [
        (
            label,
            line([(end / unit, value) for end, value in zip(_stretched(ends), _stretched(values), strict=True)], x, y),
            style,
        )
        for label, values, style in drawn
    ]
    return {
        "x": x,
        "y": y,
        "unit": word,
        "lines": lines,
        "peak": run.get("peak_ram_bytes"),
        "gpu": run.get("peak_gpu_bytes"),
    }


def _stretched(values: Sequence[Number]) -> Sequence[Number]:
    """Two points for a single block, so that it is drawn as a line from its beginning to its end."""
    return values if len(values) > 1 else [values[0] * 0.999, values[0]]


def _rescues(facts: Facts) -> dict[str, list[dict[str, Any]]]:
    """The rescues by kind: ``real`` (counted against the limit) and ``notes``."""
    found: dict[str, list[str]] = {}
    for record in facts.records:
        for rescue in record.rescues:
            found.setdefault(rescue.kind, []).append(f"{record.name}: {rescue.detail}")
    kinds = [
        {
            "kind": kind,
            "words": KINDS[kind],
            "layers": len(lines),
            "lines": lines[:_DETAILS],
            "more": max(0, len(lines) - _DETAILS),
        }
        for kind, lines in found.items()
    ]
    return {
        "real": [kind for kind in kinds if kind["kind"] not in NOTES],
        "notes": [kind for kind in kinds if kind["kind"] in NOTES],
    }

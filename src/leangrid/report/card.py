"""README.md of a result, the model card: what it is, how it was made and what was measured, with a header in the hub's
metadata format."""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from leangrid.grids import grid_class
from leangrid.recipe import Recipe
from leangrid.report.budget import describe_budget
from leangrid.report.experts import expert_figures
from leangrid.report.facts import Facts, finite
from leangrid.report.records import LayerRecord
from leangrid.report.serving import snippet
from leangrid.report.shares import describe_shares
from leangrid.report.tuning import describe_finish, describe_tuning

log = logging.getLogger("leangrid")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WORST = 5  # layers shown by name
FIGURES = (
    ("perplexity", "perplexity"),
    ("reference_perplexity", "perplexity of the original"),
    ("kl_mean", "KL from the original, mean (nats)"),
    ("kl_p99", "KL, 99th percentile (nats)"),
    ("top1_agreement", "same most likely token"),
    ("embedding_cosine_mean", "1 - cosine of embeddings"),
)
_COUNTS = ("n", "seconds", "limit", "version")  # figures of a task that are no metrics
_OF_ORIGINAL = "reference_perplexity"  # a figure of the original, not of this model


def render_card(facts: Facts) -> str:
    """The card as Markdown with the hub's YAML header.

    An error in rendering does not end a run that took hours: it is logged, and the card says where the figures are."""
    try:
        return _card(facts)
    except Exception as error:
        log.warning("the model card could not be written: %s: %s", type(error).__name__, error)
        return (
            f"# {facts.result['scheme']}\n\nQuantized with leangrid. The figures of each layer are in records.jsonl.\n"
        )


def _card(facts: Facts) -> str:
    measured = list(measurements(facts))
    parts = [f"---\n{_metadata(facts, measured).to_yaml()}\n---", f"# {_plain(facts.name)}, {facts.recipe.scheme}"]
    language, lines = snippet(facts)
    parts += [_made(facts), f"```{language}\n{lines}\n```", _losses(facts.records)]
    if facts.structure:
        parts.append("## What was quantized, and what was not\n\n" + _table(("", ""), _found(facts)))
    if experts := expert_figures(facts.records):
        parts.append(_experts(experts))
    if measured:
        warned = [f"**Warning:** {_plain(warning)}." for warning in facts.quality.get("warnings", [])]
        parts.append("\n\n".join(("## Measured", *warned, *(_measured(found) for found in measured))))
    parts.append(_rescues(facts.records))
    return "\n\n".join(parts) + "\n"


def measurements(facts: Facts) -> Iterator[dict[str, Any]]:
    """Everything that was measured, each under the keys of ``eval --json`` with ``on``, what it was measured on: first
    by the quality gate, then by ``eval --keep``.

    The gate's first measurement is ``seen``: its text was calibrated with, which makes every quantizer look better; its
    second is on other text, of ``few`` tokens."""
    gate, recipe = facts.quality, facts.recipe
    if finite(gate.get("value")):
        tokens = f"{gate.get('tokens')} tokens of {describe_calibration(recipe)}"
        on = f"the first {gate.get('windows')} calibration windows, {tokens}"
        key = "kl_mean" if gate["measure"] == "kl" else "embedding_cosine_mean"
        names = ("perplexity", "reference_perplexity", "top1_agreement", "tokens")
        yield {
            "on": on,
            "dataset": describe_calibration(recipe),
            key: gate["value"],
            **{name: gate.get(name) for name in names},
            "seen": True,
        }
        unseen = gate.get("unseen") or {}
        if finite(unseen.get("value")):
            text = str(unseen.get("text"))
            on = f"{unseen.get('windows')} windows, {unseen.get('tokens')} tokens, that calibration did not see: {text}"
            figures = {key: unseen["value"], **{name: unseen.get(name) for name in names}}
            yield {"on": on, "dataset": text, **figures, "seen": False, "few": True}
        pictures = gate.get("pictures") or {}
        if finite(pictures.get("value")) and pictures != {name: gate.get(name) for name in pictures}:
            of = describe_calibration(recipe)
            on = f"{pictures.get('windows')} rows with pictures, {pictures.get('tokens')} tokens, not seen: of {of}"
            figures = {key: pictures["value"], **{name: pictures.get(name) for name in names}}
            yield {"on": on, "dataset": of, **figures, "seen": False, "few": True}
    for found in facts.evaluations:
        text = _last(str(found.get("text") or ""))
        on = f"{found.get('windows')} windows of {found.get('length')} tokens of {text}" if text else "tasks"
        yield {"seen": False, **found, "on": on, "dataset": text}


def describe_calibration(recipe: Recipe) -> str:
    """The calibration corpus in words; a file without its folder."""
    words = {
        "self": "text sampled from the model itself",
        "embedded": "Python's documentation (a smoke test, not a quality recipe)",
    }
    if recipe.parts:
        named = [f"{part.windows} windows of {words.get(part.source, _last(part.source))}" for part in recipe.parts]
        return ", ".join(named[:-1]) + f" and {named[-1]}"
    return words.get(recipe.calibration, _last(recipe.calibration))


def describe_scheme(recipe: Recipe) -> str:
    """What the scheme stores and how it was found, in words."""
    scheme = recipe.parsed
    kind = grid_class(scheme).describe(scheme)
    over = f"each group of {scheme.group_size} weights" if scheme.group_size else "each row"
    learned = {
        "leanquant": "learned on the inverse Hessian (LeanQuant)",
        "gptq": "min-max, GPTQ sweep",
        "rtn": "min-max, rounded",
    }
    return f"{scheme.bits} bits, one {kind} for {over}; {learned[scheme.method]}"


def _metadata(facts: Facts, measured: Sequence[Mapping[str, Any]]) -> ModelCardData:
    """The header (https://huggingface.co/docs/hub/model-cards), with the figures as model-index."""
    source, encoder = facts.source, facts.quality.get("measure") == "cosine"
    from_hub = _HUB_ID.fullmatch(source.split("@")[0]) is not None
    task = "feature-extraction" if encoder else "text-generation"
    results = [result for found in measured for result in _eval_results(found, task)]
    return ModelCardData(
        library_name="mlx" if facts.container == "mlx" else "transformers",
        tags=[
            "leangrid",
            "quantized",
            *([] if facts.recipe.parsed.method != "leanquant" else ["leanquant"]),
            f"{facts.recipe.parsed.bits}-bit",
        ],
        pipeline_tag=task,
        base_model=source.split("@")[0] if from_hub else None,
        base_model_relation="quantized" if from_hub else None,
        model_name=f"{_one_line(facts.name)}, {facts.recipe.scheme}" if results else None,
        eval_results=results or None,
    )


def _eval_results(found: Mapping[str, Any], task: str) -> Iterator[EvalResult]:
    dataset = _one_line(str(found["dataset"])) or "text"
    for key, label in FIGURES:
        if (
            key != _OF_ORIGINAL
            and not ((found["seen"] or found.get("few")) and key == "perplexity")
            and finite(found.get(key))
        ):
            label += ", on its own calibration text" if found["seen"] else ""
            yield EvalResult(task, dataset, _one_line(str(found["on"])), key, _digits(found[key]), metric_name=label)
    for name, metric, value in task_figures(found):
        yield EvalResult(
            task, _one_line(name), _one_line(name), metric, _digits(value), metric_name=f"{metric}, {_one_line(name)}"
        )


def task_figures(found: Mapping[str, Any]) -> Iterator[tuple[str, str, float]]:
    """(task, metric, value) of an evaluation's tasks; counts and standard errors are no metrics."""
    for name, figures in (found.get("tasks") or {}).items():
        for metric, value in figures.items():
            if finite(value) and metric not in _COUNTS and "stderr" not in metric:
                yield name, metric, value


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


def _one_line(text: str) -> str:
    """The text on one line without unprintable characters, as YAML and the hub take names."""
    return " ".join("".join(character if character.isprintable() else " " for character in text).split())


def _last(path: str) -> str:
    return path if path.startswith("hf:") else path.replace("\\", "/").rsplit("/", 1)[-1]


def _made(facts: Facts) -> str:
    recipe, bits = facts.recipe, facts.result.get("bits_per_weight")
    version = str((facts.manifest.get("versions") or {}).get("leangrid", ""))
    rows = [
        ("source", _plain(facts.source)),
        ("weights", describe_scheme(recipe)),
        *(
            [("other schemes", "; ".join(f"`{_plain(key)}` {value}" for key, value in recipe.layers.items()))]
            if recipe.layers
            else []
        ),
        (
            "container",
            facts.container + (f", exported from {_plain(facts.exported_from)}" if facts.exported_from else ""),
        ),
        *([("bits per weight", f"{bits:.3f} with grids")] if bits is not None else []),
        (
            "calibration",
            f"{recipe.samples} x {recipe.length} tokens: {_plain(describe_calibration(recipe))}, seed {recipe.seed}",
        ),
        ("settings", f"p {recipe.p}, correct {recipe.correct}, refine {recipe.refine}, damping {recipe.damping}"),
        *describe_budget(facts.result.get("budget") or {}),
        *describe_shares(facts.result.get("correction") or {}),
        *describe_tuning(facts.result.get("tuning") or {}),
        *describe_finish(facts.result.get("finish") or {}),
        ("made with", f"leangrid {version}".strip()),
    ]
    return _table(("", ""), rows)


def _found(facts: Facts) -> list[tuple[str, str]]:
    return [(name, f"`{_plain(text)}`") for name, text in facts.structure]


def _losses(records: Sequence[LayerRecord]) -> str:
    if not records:
        return "No layer was quantized."
    names = (("this model", "loss"), ("min-max GPTQ", "loss_minmax"), ("rounding", "loss_rounding"))
    rows = [(label, f"{sum(getattr(record, key) for record in records):.4g}") for label, key in names]
    worst = sorted(records, key=lambda record: record.loss, reverse=True)[:_WORST]
    most = [(f"`{_plain(record.name)}`", *(f"{getattr(record, key):.4g}" for _, key in names)) for record in worst]
    what = f"Sum over {len(records)} layers of tr(E H E^T)/2, all three on the same calibration Hessians."
    per_layer = _table(("layer", "loss", "min-max GPTQ", "rounding"), most)
    return "\n\n".join(("## Layer losses", what, _table(("", "loss"), rows), "The layers with most of it:", per_layer))


def _experts(found: Mapping[str, Any]) -> str:
    head = ("", "experts", "least", "median", "most", "starved", "unseen")
    every = [("all", found), *((f"`{_plain(block['block'])}`", block) for block in found["blocks"])]
    keys = ("experts", "min", "median", "max", "starved", "unseen")
    rows = [(name, *(f"{of[key]:.0f}" for key in keys)) for name, of in every]
    what = (
        "Calibration tokens that the routers sent to an expert. A starved one had fewer than its linears have columns "
        "and shares the Hessian of all, an unseen one had none."
    )
    return "\n\n".join(("## Tokens per expert", what, _table(head, rows)))


def _measured(found: Mapping[str, Any]) -> str:
    rows = [(label, f"{found[key]:.4g}") for key, label in FIGURES if found.get(key) is not None]
    rows += [(f"{_plain(name)}, {_plain(metric)}", f"{value:.4g}") for name, metric, value in task_figures(found)]
    caution = " This text was calibrated with; expect more on others." if found["seen"] else ""
    return f"On {_plain(str(found['on']))}.{caution}\n\n{_table(('', ''), rows)}"


def _rescues(records: Sequence[LayerRecord]) -> str:
    found = [(record.name, rescue) for record in records for rescue in record.rescues if not rescue.is_note]
    lines = [f"- `{_plain(name)}`: {rescue.kind}: {_plain(rescue.detail)}" for name, rescue in found]
    return "## Rescues\n\n" + ("\n".join(lines) if lines else "None: every layer was quantized as asked.")


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _plain(text: str) -> str:
    """The text on one line, with what would begin a table cell, a tag or a code span escaped."""
    return " ".join(text.split()).replace("|", "\\|").replace("`", "'").replace("<", "&lt;")

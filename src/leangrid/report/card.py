"""README.md of a result: what it is, how it was made, and only numbers that were measured."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from leangrid.recipe import Recipe
from leangrid.report.records import LayerRecord

log = logging.getLogger("leangrid")

_WORST = 5  # layers shown by name
_FIGURES = (
    ("perplexity", "perplexity"),
    ("reference_perplexity", "perplexity of the original"),
    ("kl_mean", "KL from the original, mean (nats)"),
    ("kl_p99", "KL, 99th percentile"),
    ("top1_agreement", "same most likely token"),
    ("embedding_cosine_mean", "1 - cosine of embeddings"),
)

# How each container is opened, as a fenced block less its fences: language, then lines.
_PLAIN = 'python\nfrom transformers import AutoModelForCausalLM\nmodel = AutoModelForCausalLM.from_pretrained("DIR")'
_OURS = 'python\nimport leangrid\nmodel, tokenizer = leangrid.load("DIR")'
_BLOCKS = "bash\nleangrid export DIR FILE --to gguf\nllama-server -m FILE/model.gguf"
_GPTQ = 'python\nfrom gptqmodel import GPTQModel\nmodel = GPTQModel.load("DIR")'
_MLX = """python
from mlx_lm import generate, load  # pip install mlx-lm
model, tokenizer = load("DIR")
print(generate(model, tokenizer, prompt="Once upon a time"))"""
USE: dict[str, str] = {
    "compressed-tensors": _PLAIN,
    "gptq": _GPTQ,
    "gptq_v1": _GPTQ,
    "awq": _PLAIN.replace("\n", "\n# transformers reads awq with the help of: pip install gptqmodel\n", 1),
    "mlx": _MLX,
    "dense": _PLAIN,
    "onnx": 'python\nimport onnxruntime_genai as og\nmodel = og.Model("DIR")',
    "gguf": "bash\nllama-server -m DIR/model.gguf",
    "lut": _PLAIN.replace("\n", "\nimport leangrid  # registers the format\n", 1),
}


@dataclass(frozen=True)
class _Facts:
    source: str
    recipe: Recipe
    records: Sequence[LayerRecord]
    bits_per_weight: float | None
    license_name: str | None
    evaluation: dict[str, Any] | None
    version: str
    container: str
    exported_from: str | None


def model_card(
    source: str,
    recipe: Recipe,
    records: Sequence[LayerRecord],
    *,
    bits_per_weight: float | None,
    license_name: str | None = None,
    evaluation: dict[str, Any] | None = None,
    version: str = "",
    container: str | None = None,
    exported_from: str | None = None,
) -> str:
    """The card as Markdown with the hub's YAML header. It never fails a run: where it cannot be written it says so.

    Args:
        recipe: the settled recipe.
        bits_per_weight: of the quantized linears; None where the container has no such figure.
        license_name: the source's license id where its card names one.
        evaluation: a dict of ``evaluate``; its figures get a table of their own.
        container: the format of the files; None: the recipe's.
        exported_from: the result, and its format, whose codes these are.
    """
    container = container or recipe.format
    facts = _Facts(source, recipe, records, bits_per_weight, license_name, evaluation, version, container, exported_from)
    try:
        return _card(facts)
    except Exception as error:  # hours of work do not end at a line of prose
        log.warning("the model card could not be written: %s: %s", type(error).__name__, error)
        return f"# {recipe.scheme}\n\nQuantized with leangrid. The figures of each layer are in records.jsonl.\n"


def _card(facts: _Facts) -> str:
    name = facts.source.rstrip("/").replace("\\", "/").rsplit("/", 1)[-1] or "model"
    parts = [_header(facts.source, facts.license_name, facts.container), f"# {_plain(name)}, {facts.recipe.scheme}"]
    parts += [_made(facts), _use(facts), _losses(facts.records)]
    if facts.evaluation is not None:
        parts.append(_measured(facts.evaluation))
    parts.append(_rescues(facts.records))
    return "\n\n".join(parts) + "\n"


def _header(source: str, license_name: str | None, container: str) -> str:
    # JSON strings are YAML strings: a name with a colon or quote cannot break the header.
    lines = ["---", f"library_name: {'mlx' if container == 'mlx' else 'transformers'}", "tags: [leangrid, quantized]"]
    if source.count("/") == 1 and not source.startswith((".", "/", "~")):
        lines.append(f"base_model: {json.dumps(source.split('@')[0])}")
    if license_name:
        lines.append(f"license: {json.dumps(license_name)}")
    return "\n".join([*lines, "---"])


def _made(facts: _Facts) -> str:
    recipe, bits = facts.recipe, facts.bits_per_weight
    scheme = recipe.parsed
    kinds = {"affine": "affine grid (scale and zero point)", "offset": "affine grid (scale and offset)",
             "superblock": f"{scheme.block} grid (integer scales in blocks of 256)"}  # fmt: skip
    kind = kinds.get(scheme.grid, f"non-uniform grid of {scheme.levels} levels")
    over = f"each group of {scheme.group_size} weights" if scheme.group_size else "each row"
    learned = {"leanquant": "learned on the inverse Hessian (LeanQuant)", "gptq": "min-max, GPTQ sweep", "rtn": "min-max, rounded"}
    words = {"self": "text sampled from the model itself", "embedded": "Python's documentation (a smoke test, not a quality recipe)"}
    calibration = words.get(recipe.calibration, recipe.calibration.replace("\\", "/").rsplit("/", 1)[-1])
    rows = [("source", _plain(facts.source)), ("weights", f"{scheme.bits} bits, one {kind} for {over}; {learned[scheme.method]}"),
            *([("other schemes", "; ".join(f"`{_plain(key)}` {value}" for key, value in recipe.layers.items()))] if recipe.layers else []),
            ("container", facts.container + (f", exported from {_plain(facts.exported_from)}" if facts.exported_from else "")),
            *([("bits per weight", f"{bits:.3f} with grids")] if bits is not None else []),
            ("calibration", f"{recipe.samples} x {recipe.length} tokens: {_plain(calibration)}, seed {recipe.seed}"),
            ("settings", f"p {recipe.p}, correct {recipe.correct}, refine {recipe.refine}, damping {recipe.damping}"),
            ("made with", f"leangrid {facts.version}".strip())]  # fmt: skip
    return _table(("", ""), rows)


def _use(facts: _Facts) -> str:
    blocks = facts.container == "gguf" and not facts.exported_from  # the blocks still lie in a directory
    return f"```{_BLOCKS if blocks else USE.get(facts.container, _OURS)}\n```"


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


def _measured(evaluation: dict[str, Any]) -> str:
    rows = [(label, f"{evaluation[key]:.4g}") for key, label in _FIGURES if evaluation.get(key) is not None]
    text = _plain(str(evaluation.get("text", "")).replace("\\", "/").rsplit("/", 1)[-1])
    return f"## Measured\n\n{evaluation.get('windows')} windows of {evaluation.get('length')} tokens of {text}.\n\n{_table(('', ''), rows)}"


def _rescues(records: Sequence[LayerRecord]) -> str:
    found = [(record.name, rescue) for record in records for rescue in record.rescues if not rescue.is_note]
    lines = [f"- `{_plain(name)}`: {rescue.kind}: {_plain(rescue.detail)}" for name, rescue in found]
    return "## Rescues\n\n" + ("\n".join(lines) if lines else "None: every layer was quantized as asked.")


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _plain(text: str) -> str:
    """One line that cannot open a table cell, a tag or a code span: names come from files of strangers."""
    return " ".join(text.split()).replace("|", "\\|").replace("`", "'").replace("<", "&lt;")

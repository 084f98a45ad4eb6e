"""The quality gate: the finished files are opened again and held against the original, before the directory gets its
name.

Both models are walked block by block, side by side, so the gate holds one block of each. It sees the bytes that were
written, not the tensors that were meant: a convention shifted by one, a layer in the wrong place or a file that no
reader can open ends here. The original side is transformers' own model of the source (original.py), so that a
fault of our reader, which both walks share, ends here too.

The figures are those of the first calibration windows, and of windows that calibration never saw, where plain rounding
is measured beside the result: a calibration that was too small shows there. A model with a language-model head is
judged by its mean KL from the original, any other by its mean-pooled last hidden states' cosine distance."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from leangrid.errors import Interrupted, LeangridError, first_line
from leangrid.gate.original import Reference, held_against, said
from leangrid.gate.side_by_side import Walked, outputs, walk
from leangrid.inference.result_reader import DequantizedResult, ResultReader
from leangrid.machine.devices import has_own_memory, is_out_of_memory, release_cached_memory
from leangrid.metrics.divergence import divergence
from leangrid.metrics.embedding import cosine_distance
from leangrid.metrics.perplexity import CHUNK, negative_log_likelihood, perplexity
from leangrid.models.skeleton import Skeleton
from leangrid.planning.sizes import GATE_LENGTH, GATE_WINDOWS
from leangrid.recipe import Recipe

WORST = 3

# Above these a model is broken rather than quantized. Measured on SmolLM2: 0.11 at 4 bits, 0.47 at 3, and 3.3 for plain
# rounding at 3, which is perplexity 371 instead of 13.
KL_LIMITS = {8: 0.1, 5: 0.5, 4: 1.0, 3: 2.0, 2: 6.0}
COSINE_LIMITS = {8: 0.02, 5: 0.1, 4: 0.2, 3: 0.4, 2: 0.7}
# How much more than rounding's the result's distance may grow from the calibration's windows to unseen ones. Measured
# on tiny models: 4 to 30 after 4 or 8 windows of 32 tokens, at most 2.8 after 32 of them and 1.3 after 32 of 128.
MUCH_WORSE = 4.0
TINY = 0.001  # share of the limit below which no distance is worth a warning


@dataclass(frozen=True)
class Unseen:
    """Windows that calibration did not see, int64 [windows, length], and the text they are from, in words."""

    windows: Int64[Tensor, "windows length"]
    text: str


def default_limit(bits: int, measure: str) -> float:
    """The largest distance that passes at ``bits`` bits; ``measure`` is kl or cosine."""
    limits = COSINE_LIMITS if measure == "cosine" else KL_LIMITS
    return limits[max((known for known in limits if known <= bits), default=min(limits))]


def judge(
    original: Skeleton,
    directory: Path,
    windows: Int64[Tensor, "samples length"],
    recipe: Recipe,
    device: str,
    unseen: Unseen | None = None,
    doubts: list[str] | None = None,
) -> dict[str, Any]:
    """What the manifest keeps as ``quality``.

    Args:
        original, directory: the source, and the finished files.
        windows: of the calibration; the first two are measured, and ``unseen`` beside them where there is other text.
        recipe: resolved; plain rounding is measured in its schemes.
        doubts: differences between the source and ``original`` that were found otherwise (a .gguf file), one phrase
        each.

    Returns:
        measure, value, rounding (the value of plain rounding), limit, windows, tokens, worst_layers, with a
        language-model head also top1_agreement and both perplexities, all on the calibration's windows; ``unseen``: the
        same of other windows, and ``text``, where they are from; ``original``: what our reading was held against;
        ``warnings``, sentences, where there are any; ``error``, one sentence, where the result cannot be trusted. A
        result that cannot be opened or run is an answer, not an exception; Interrupted (the source changed) passes.
    """
    texts = [windows[:GATE_WINDOWS, :GATE_LENGTH]] + (
        [] if unseen is None else [unseen.windows[:GATE_WINDOWS, :GATE_LENGTH]]
    )
    try:
        try:
            found = _measure(original, directory, texts, recipe, device)
        except RuntimeError as error:
            if not (has_own_memory(device) and is_out_of_memory(error)):
                raise
            release_cached_memory(device)
            found = _measure(original, directory, texts, recipe, "cpu")
    except Interrupted:
        raise
    except (LeangridError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError, OSError) as error:
        return {"error": f"the result cannot be opened again and run: {first_line(error)}"}
    seen, *others = found.pop("texts")
    problems = found.pop("problems")
    found = seen | found | {"limit": default_limit(recipe.parsed.bits, seen["measure"])}
    if unseen is not None:
        found["unseen"] = {"text": unseen.text} | others[0]
    if problems:
        found["error"] = said("leangrid read the original otherwise than transformers", problems)
    elif doubts:
        found["error"] = said("leangrid read another model from the .gguf file than it holds", doubts)
    elif distance(found) is None:
        found["error"] = "the result's predictions are not finite"
    warnings = _warnings(found)
    return found | ({"warnings": warnings} if warnings else {})


def distance(quality: Mapping[str, Any]) -> float | None:
    """The larger of the distances on the calibration's windows and on unseen ones: what the limit is for."""
    values = [quality.get("value"), *([quality["unseen"].get("value")] if "unseen" in quality else [])]
    return None if any(value is None for value in values) else max(values)


def passed(quality: Mapping[str, Any], limit: float | None = None) -> bool:
    """Whether what ``judge`` found is within ``limit`` (its own default where None). Nothing found is nothing
    passed."""
    value, allowed = distance(quality), quality.get("limit") if limit is None else limit
    return "error" not in quality and value is not None and allowed is not None and value <= allowed


def verdict(quality: Mapping[str, Any], limit: float | None = None) -> str:
    """Why a result did not pass, in one sentence."""
    if "error" in quality:
        return str(quality["error"])
    what = (
        "the mean KL from the original"
        if quality.get("measure") == "kl"
        else "the distance of the embeddings from the original's"
    )
    worst = ", ".join(f"{layer['name']} ({layer['error']:.2g})" for layer in quality.get("worst_layers", []))
    allowed = quality.get("limit") if limit is None else limit
    layers = f"worst layers by the relative error of their outputs: {worst}"
    return f"{what} is {distance(quality)}, {allowed} is allowed; {layers}"


@torch.no_grad()
def _measure(original: Skeleton, directory: Path, texts: list[Tensor], recipe: Recipe, device: str) -> dict[str, Any]:
    """``original``, ``problems`` and ``worst_layers``, and the figures of each of the ``texts`` in turn."""
    linears = [name for index in range(len(original.blocks)) for name in original.linear_names(index)]
    weights = DequantizedResult(ResultReader(directory), linears)
    try:
        result = Skeleton(weights, original.compute_dtype)
        rounding = recipe if len(texts) > 1 and recipe.parsed.method != "rtn" else None
        walked = walk(original, result, texts, rounding, device)
        with held_against(original, device) as reference:
            figures = [
                _figures(original, result, walked, number, ids, reference, device) for number, ids in enumerate(texts)
            ]
        worst = sorted(walked.errors, key=lambda name: -walked.errors[name])[:WORST]
        layers = [{"name": name, "error": round(walked.errors[name], 4)} for name in worst]
        return {"texts": figures, "problems": reference.problems, "original": reference.kind, "worst_layers": layers}
    finally:
        weights.close()


def _figures(
    original: Skeleton, result: Skeleton, walked: Walked, number: int, ids: Tensor, reference: Reference, device: str
) -> dict[str, Any]:
    """How far the result is from the original on text ``number``: from transformers' outputs where they are there, else
    from our walk's."""
    own = outputs(original, ids, walked.original[number], device)
    expected = list(own) if reference.model is None else reference.outputs(ids, original.causal, device)
    if reference.model is not None:
        reference.compare(expected, own)
    found = _distance(expected, outputs(result, ids, walked.result[number], device), ids, original.causal)
    if walked.rounded:
        found["rounding"] = _distance(
            expected, outputs(original, ids, walked.rounded[number], device), ids, original.causal
        )["value"]
    return found | {"windows": ids.shape[0], "tokens": ids.numel()}


def _distance(expected: list[Tensor], found: Iterator[Tensor], ids: Tensor, predicts: bool) -> dict[str, Any]:
    """From what the original and another model give out, window by window."""
    if not predicts:
        pooled = [torch.stack([one.double().mean(0) for one in windows]) for windows in (expected, found)]
        return {"measure": "cosine", "value": _rounded(cosine_distance(*pooled))}
    compared, surprises = [], []
    for one, other, window in zip(expected, found, ids.cpu(), strict=True):
        for start in range(0, len(window) - 1, CHUNK):
            part = slice(start, min(start + CHUNK, len(window) - 1))
            compared.append(divergence(torch.log_softmax(one[part].float(), -1), other[start:]))
        surprises.append([negative_log_likelihood(logits, window) for logits in (other, one)])
    perplexities = [_rounded(perplexity(torch.cat(parts))) for parts in zip(*surprises, strict=True)]
    return {
        "measure": "kl",
        "value": _rounded(float(torch.cat([one.kl for one in compared]).mean())),
        "top1_agreement": _rounded(float(torch.cat([one.agrees for one in compared]).double().mean())),
        "perplexity": perplexities[0],
        "reference_perplexity": perplexities[1],
    }


def _warnings(found: Mapping[str, Any]) -> list[str]:
    """One sentence for each sign of a calibration that was too small, seen on windows that it did not hold."""
    unseen, seen = found.get("unseen") or {}, found["value"]
    value, rounding, before = unseen.get("value"), unseen.get("rounding"), found.get("rounding")
    if value is None or seen is None or rounding is None or before is None or value <= TINY * found["limit"]:
        return []
    what = "KL from the original" if found["measure"] == "kl" else "distance from the original"
    more = "calibrate with more text (--samples, --length)"
    if value > rounding:
        return [
            f"on text that calibration did not see ({unseen['text']}) plain rounding is nearer to the original: "
            f"its {what} is {rounding:.3g}, the result's {value:.3g}; {more}"
        ]
    if value * before > MUCH_WORSE * seen * rounding:
        return [
            f"the {what} is {value:.3g} on text that calibration did not see ({unseen['text']}), "
            f"{seen:.3g} on the text it saw; {more}"
        ]
    return []


def _rounded(value: float) -> float | None:
    """Six digits: what differs beyond them is the machine's, not the result's."""
    return float(f"{value:.6g}") if math.isfinite(value) else None

"""The quality gate: the finished files are opened again and held against the original, before the directory gets its
name.

Both models are walked block by block, side by side, so the gate holds one block of each. It sees the bytes that were
written, not the tensors that were meant: a convention shifted by one, a layer in the wrong place or a file that no
reader can open ends here. The original side is transformers' own model of the source (original.py), so that a
fault of our reader, which both walks share, ends here too.

The figures are those of the first calibration windows, and of windows that calibration never saw, where plain rounding
is measured beside the result: a calibration that was too small shows there. After a calibration by rows with pictures
they are those of the first rows, of text, and of rows with pictures that calibration never saw. A model with a
language-model head is judged by its mean KL from the original, any other by its mean-pooled last hidden states' cosine
distance."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from leangrid.data.windows import PictureRows, Windows
from leangrid.errors import Interrupted, LeangridError, first_line
from leangrid.gate.original import OriginalModel, describe_problems, open_reference
from leangrid.gate.quality import Distance, Quality, default_limit, list_warnings
from leangrid.gate.side_by_side import Walked, outputs, walk
from leangrid.gate.unseen import Unseen
from leangrid.machine.devices import has_own_memory, is_out_of_memory, release_cached_memory
from leangrid.metrics.divergence import divergence
from leangrid.metrics.embedding import cosine_distance
from leangrid.metrics.perplexity import CHUNK, negative_log_likelihood, perplexity
from leangrid.models.model_inputs import Inputs, token_ids
from leangrid.models.result_reader import DequantizedResult, ResultReader
from leangrid.models.skeleton import Skeleton
from leangrid.planning.sizes import GATE_LENGTH, GATE_WINDOWS
from leangrid.recipe import Recipe

WORST = 3  # layers that are named


def judge_result(
    original: Skeleton,
    directory: Path,
    windows: Windows,
    recipe: Recipe,
    device: str,
    unseen: Unseen | None = None,
    gguf_differences: list[str] | None = None,
    unseen_pictures: PictureRows | None = None,
) -> Quality:
    """Measure how far the finished files are from the original.

    Args:
        original, directory: the source, and the finished files.
        windows: of the calibration; the first two are measured, and ``unseen`` beside them where there is other text.
        recipe: resolved; plain rounding is measured in its schemes.
        device: where both models run; on the CPU instead where the device has too little memory.
        gguf_differences: differences between a .gguf source and ``original``, one phrase each; None for other sources.
        unseen_pictures: rows with pictures beside the calibration's, where that was by such rows and there are more.

    Returns:
        What was found. A result that cannot be opened or run is an answer with an ``error``, not an exception.

    Raises:
        Interrupted: the source changed while it was read.
    """
    texts = {"seen": _start_of(windows)}
    texts |= {} if unseen is None else {"unseen": _start_of(unseen.windows)}
    texts |= {} if unseen_pictures is None else {"pictures": _start_of(unseen_pictures)}
    try:
        try:
            found, problems = _measure(original, directory, texts, recipe, device)
        except RuntimeError as error:
            if not (has_own_memory(device) and is_out_of_memory(error)):
                raise
            release_cached_memory(device)
            found, problems = _measure(original, directory, texts, recipe, "cpu")
    except Interrupted:
        raise
    except (LeangridError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError, OSError) as error:
        return Quality(error=f"the result cannot be opened again and run: {first_line(error)}")
    if unseen is not None:
        found = replace(found, unseen_text=unseen.text)
    if isinstance(windows, PictureRows) and unseen_pictures is None:
        found = replace(found, pictures=found.seen)
    if problems:
        error = describe_problems("leangrid read the original otherwise than transformers", problems)
    elif gguf_differences:
        error = describe_problems("leangrid read another model from the .gguf file than it holds", gguf_differences)
    else:
        error = None if math.isfinite(found.distance) else "the result's predictions are not finite"
    return replace(found, error=error, warnings=tuple(list_warnings(found)))


@torch.no_grad()
def _measure(
    original: Skeleton, directory: Path, texts: dict[str, list[Inputs]], recipe: Recipe, device: str
) -> tuple[Quality, list[str]]:
    """The figures on each of ``texts`` (seen; unseen and pictures if there are such), and how our reading of the
    original differs from transformers'."""
    weights = DequantizedResult(ResultReader(directory), original.all_linear_names())
    try:
        result = Skeleton(weights, original.compute_dtype)
        if original.sees_pictures:
            result.see_pictures()
        rounding = recipe if len(texts) > 1 and recipe.parsed.method != "rtn" else None
        walked = walk(original, result, list(texts.values()), rounding, device)
        with open_reference(original, device) as reference:
            distances = {
                name: _compare_outputs(original, result, walked, number, text, reference, device)
                for number, (name, text) in enumerate(texts.items())
            }
        worst = sorted(walked.errors, key=lambda name: -walked.errors[name])[:WORST]
        found = Quality(
            seen=distances["seen"],
            unseen=distances.get("unseen"),
            pictures=distances.get("pictures"),
            original=reference.kind,
            worst_layers=tuple({"name": name, "error": round(walked.errors[name], 4)} for name in worst),
            limit=default_limit(recipe.parsed.bits, distances["seen"].measure),
        )
        return found, reference.problems
    finally:
        weights.close()


def _compare_outputs(
    original: Skeleton,
    result: Skeleton,
    walked: Walked,
    number: int,
    text: list[Inputs],
    reference: OriginalModel,
    device: str,
) -> Distance:
    """How far the result is from the original on text ``number``: from the outputs of transformers' model where there
    is one, else from those of our walk."""
    has_lm_head = original.has_lm_head
    own = outputs(original, text, walked.original[number], device)
    if reference.model is None:
        expected = list(own)
    else:
        expected = reference.outputs(text, has_lm_head, device, original.compute_dtype)
    if reference.model is not None:
        reference.compare(expected, own)
    shown = _tokens_of_pictures(original) if original.sees_pictures else ()
    ours = outputs(result, text, walked.result[number], device)
    found = _measure_distance(expected, ours, text, has_lm_head, shown)
    if not walked.rounded:
        return found
    rounded = outputs(original, text, walked.rounded[number], device)
    return replace(found, rounding=_measure_distance(expected, rounded, text, has_lm_head, shown).value)


def _measure_distance(
    expected: list[Tensor], found: Iterator[Tensor], text: list[Inputs], has_lm_head: bool, shown: tuple[int, ...]
) -> Distance:
    """The distance between the outputs of the original and of another model, window by window. Where a token of
    ``shown``, which stands for a picture, is next, nothing is predicted."""
    tokens = sum(token_ids(window).numel() for window in text)
    if not has_lm_head:
        pooled = [torch.stack([one.double().mean(0) for one in windows]) for windows in (expected, found)]
        return Distance("cosine", _round(cosine_distance(*pooled)), len(text), tokens)
    compared, surprises = [], []
    for one, other, window in zip(expected, found, text, strict=True):
        ids = token_ids(window)[0].cpu()
        counts = ~torch.isin(ids[1:], torch.tensor(shown, dtype=ids.dtype))
        if not counts.all():
            places = torch.cat((counts.nonzero()[:, 0], torch.tensor([len(ids) - 1])))
            one, other, ids = one[places], other[places], torch.cat((ids[:1], ids[1:][counts]))
        for start in range(0, len(ids) - 1, CHUNK):
            part = slice(start, min(start + CHUNK, len(ids) - 1))
            compared.append(divergence(torch.log_softmax(one[part].float(), -1), other[start:]))
        surprises.append([negative_log_likelihood(logits, ids) for logits in (other, one)])
    perplexities = [_round(perplexity(torch.cat(parts))) for parts in zip(*surprises, strict=True)]
    return Distance(
        "kl",
        _round(float(torch.cat([one.kl for one in compared]).mean())),
        len(text),
        tokens,
        _round(float(torch.cat([one.agrees for one in compared]).double().mean())),
        *perplexities,
    )


def _start_of(windows: Windows) -> list[Inputs]:
    """The first windows, cut to the gate's length; of rows with pictures the first, whole."""
    if isinstance(windows, PictureRows):
        return list(windows[:GATE_WINDOWS])
    return list(windows[:GATE_WINDOWS, :GATE_LENGTH].split(1))


def _tokens_of_pictures(original: Skeleton) -> tuple[int, ...]:
    """The tokens that stand for pictures in the model's texts, by its config."""
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    found = (getattr(original.config, name, None) for name in names)
    return tuple(one for one in found if isinstance(one, int))


def _round(value: float) -> float:
    """Six digits: what differs beyond them is the machine's, not the result's."""
    return float(f"{value:.6g}")

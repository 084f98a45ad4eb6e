"""The calibration windows of a run: given, or from the recipe's corpus; drawn once and saved beside the journal."""

import json
from collections.abc import Callable

import torch
from torch import Tensor

from leangrid.data.calibration import decode_start, list_tokenizer_doubts
from leangrid.data.calibration import make_windows as corpus_windows
from leangrid.data.documents import Reading
from leangrid.errors import CalibrationError
from leangrid.machine import memory
from leangrid.models.tokenizer import load_tokenizer
from leangrid.planning.sizes import GATE_WINDOWS
from leangrid.progress import Event
from leangrid.run.inputs import RunInputs


def calibration_windows(inputs: RunInputs) -> Tensor:
    """The calibration windows, int64 [samples, length]: those of the request, or from the recipe's corpus.

    They are saved beside the journal, so that a resumed run has the same. ``inputs.calibration`` gets what the manifest
    says of them: source, columns, chat template, and how the first window begins.

    Raises:
        CalibrationError: wrong windows, too little text, or a tokenizer that does not fit.
    """
    journal, recipe, skeleton, given = inputs.journal, inputs.recipe, inputs.skeleton, inputs.request.windows
    saved = journal.load_artifact("windows")
    if saved is not None:
        inputs.calibration = json.loads(bytes(saved["account"].tolist())) if "account" in saved else {}
        return saved["windows"]
    positions = getattr(skeleton.config, "max_position_embeddings", None)
    tokenizer = load_tokenizer(inputs.checkpoint.directory)
    reading = Reading(recipe.calibration if given is None else "windows given")
    if given is not None:
        tokens = _checked(given, skeleton.vocabulary, positions)
        unseen = tokens[:0]
    else:
        sampler, most = _sampler(inputs), {"vocab_rows": skeleton.vocabulary, "max_positions": positions}
        found = corpus_windows(recipe, tokenizer, sampler, **most, reading=reading, extra=GATE_WINDOWS)
        tokens, unseen = found[: recipe.samples], found[recipe.samples :]
        memory.return_freed_memory()  # a corpus of tokens with their places in the text is large, and gone now
    shown = None if tokenizer is None else decode_start(tokenizer, tokens)
    inputs.calibration = {**reading.to_json(), "first": shown}
    account = json.dumps(inputs.calibration, sort_keys=True).encode()
    named = {"windows": tokens, "account": torch.tensor(list(account), dtype=torch.uint8)}
    journal.save_artifact("windows", named | ({"unseen": unseen} if len(unseen) else {}))
    sentences = (
        [] if tokenizer is None else list_tokenizer_doubts(tokenizer, inputs.checkpoint.config, skeleton.vocabulary)
    )
    sentences += reading.list_notices()
    if shown is not None:
        words = f" of {reading.describe_source()}" if reading.describe_source() else ""
        sentences.append(f"calibration: {tokens.shape[0]} x {tokens.shape[1]} tokens{words}, first: {shown}")
    progress = inputs.request.progress
    if progress is not None:
        for sentence in sentences:
            progress(Event("notice", message=sentence))
    return tokens


def _checked(windows: Tensor, vocabulary: int, positions: int | None) -> Tensor:
    """Windows that were given, contiguous; CalibrationError for what is no window of this model."""
    if windows.ndim != 2 or windows.dtype != torch.int64 or windows.numel() == 0:
        what = f"windows must be int64 [samples, length], got {windows.dtype} {list(windows.shape)}"
        raise CalibrationError(what, "windows")
    least, most = int(windows.min()), int(windows.max())
    if least < 0 or most >= vocabulary:
        raise CalibrationError(f"token ids must lie in 0..{vocabulary - 1}, got {least}..{most}", "windows")
    if positions and windows.shape[1] > positions:
        raise CalibrationError(f"windows of {windows.shape[1]} tokens, but the model takes {positions}", "windows")
    return windows.contiguous()


def _sampler(inputs: RunInputs) -> Callable[[int, int, int], Tensor] | None:
    """Draws windows from the source model itself, which is whole in memory for that time; None for an encoder."""
    if not inputs.skeleton.has_lm_head:
        return None
    progress, a_report = inputs.request.progress, 16 * inputs.recipe.samples

    def report(done: int, total: int) -> None:
        if progress is not None and done * 10 // total > (done - a_report) * 10 // total:
            progress(Event("calibrate", message=f"sampled {done:,} of {total:,} tokens from the model itself"))

    def draw(samples: int, length: int, seed: int) -> Tensor:
        from leangrid.data.sampling import sample_windows
        from leangrid.inference.load import load

        model, tokenizer = load(inputs.checkpoint.directory, dtype=torch.float32)
        return sample_windows(model, tokenizer, samples, length, seed, progress=report)

    return draw

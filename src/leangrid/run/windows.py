"""The calibration windows of a run: given, or from the recipe's corpus; made once and saved beside the journal."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from leangrid.data.calibration import check_vocabulary, decode_start, list_tokenizer_doubts
from leangrid.data.calibration import make_windows as corpus_windows
from leangrid.data.corpora import find_pictures_in
from leangrid.data.documents import Reading
from leangrid.data.files import Row
from leangrid.data.hub import PREFIX
from leangrid.data.picture_windows import PictureReader, folder_of, make_picture_windows
from leangrid.data.windows import PictureRows, Windows
from leangrid.errors import CalibrationError
from leangrid.machine import memory
from leangrid.machine.devices import has_own_memory, is_out_of_memory, release_cached_memory
from leangrid.mixture import sources_of
from leangrid.models.tokenizer import load_tokenizer
from leangrid.planning.sizes import GATE_WINDOWS
from leangrid.progress import Event
from leangrid.run.inputs import PICTURES, RunInputs


def calibration_windows(inputs: RunInputs) -> Windows:
    """The calibration windows, int64 [samples, length]: those of the request, or from the recipe's corpus. Of a corpus
    whose rows have pictures, what the model's processor makes of each row.

    They are saved beside the journal, so that a resumed run has the same. ``inputs.calibration`` gets what the manifest
    says of them: source, columns, chat template, and how the first window begins.

    Raises:
        CalibrationError: wrong windows, too little text, or a tokenizer that does not fit; pictures for a model that
            takes none, or that cannot be read.
    """
    journal, recipe, skeleton, given = inputs.journal, inputs.recipe, inputs.skeleton, inputs.request.windows
    saved = journal.load_artifact("windows")
    if saved is not None:
        inputs.calibration = json.loads(bytes(saved["account"].tolist())) if "account" in saved else {}
        return PictureRows.from_tensors(saved) if "windows" not in saved else saved["windows"]
    tokenizer = load_tokenizer(inputs.checkpoint.directory)
    reading = Reading(recipe.calibration if given is None else "windows given")
    windows, unseen = _drawn(inputs, tokenizer, reading)
    memory.return_freed_memory()  # a corpus of tokens with their places in the text is large, and gone now
    shown = None if tokenizer is None else decode_start(tokenizer, windows)
    inputs.calibration |= {**reading.to_json(), "first": shown}
    account = json.dumps(inputs.calibration, sort_keys=True).encode()
    if isinstance(windows, PictureRows):
        journal.save_artifact(PICTURES, {"rows": torch.tensor([len(windows)])})
    named = _named(windows, "windows") | (_named(unseen, "unseen") if len(unseen) else {})
    journal.save_artifact("windows", named | {"account": torch.tensor(list(account), dtype=torch.uint8)})
    sentences = (
        [] if tokenizer is None else list_tokenizer_doubts(tokenizer, inputs.checkpoint.config, skeleton.vocabulary)
    )
    sentences += reading.list_notices()
    if shown is not None:
        sentences.append(_describe(windows, reading, shown))
    progress = inputs.request.progress
    if progress is not None:
        for sentence in sentences:
            progress(Event("notice", message=sentence))
    return windows


def unseen_rows(inputs: RunInputs) -> Windows | None:
    """What the corpus had beyond the calibration's windows; None where it had no more."""
    saved = inputs.journal.load_artifact("windows") or {}
    if "windows" in saved:
        return saved.get("unseen")
    rows = PictureRows.from_tensors(saved, "unseen")
    return rows if len(rows) else None


def _drawn(inputs: RunInputs, tokenizer: Any, reading: Reading) -> tuple[Windows, Windows]:
    """The windows, and those that are left over for the quality gate."""
    recipe, skeleton, given = inputs.recipe, inputs.skeleton, inputs.request.windows
    positions = skeleton.positions
    most = {"vocab_rows": skeleton.vocabulary, "max_positions": positions}
    if given is not None:
        tokens = _checked(given, skeleton.vocabulary, positions)
        return tokens, tokens[:0]
    rows = None
    for source in sources_of(recipe.calibration):
        seed, column = recipe.seed if source.startswith(PREFIX) else None, recipe.column_of(source)
        rows = find_pictures_in(source, takes_pictures=skeleton.takes_pictures, seed=seed, column=column)
        if rows is not None and recipe.parts:
            what = "its rows have pictures, and a mixture is of texts alone"
            raise CalibrationError(what, source, "Calibrate by it alone, or leave it out")
    if rows is not None:
        return _from_pictures(inputs, rows, reading)
    found = corpus_windows(recipe, tokenizer, _sampler(inputs), **most, reading=reading, extra=GATE_WINDOWS)
    return found[: recipe.samples], found[recipe.samples :]


def _from_pictures(inputs: RunInputs, rows: Iterator[Row], reading: Reading) -> tuple[Windows, Windows]:
    from leangrid.models.processor import load_processor  # transformers' code for pictures, which others do not need

    recipe, skeleton = inputs.recipe, inputs.skeleton
    processor = load_processor(inputs.checkpoint.directory)
    if processor is None:
        what = "the checkpoint has no processor, which makes a model's inputs of pictures"
        way_out = "Add its preprocessor_config.json, or calibrate by text"
        raise CalibrationError(what, inputs.checkpoint.directory, way_out)
    reader = PictureReader(
        processor, skeleton.takes, skeleton.compute_dtype, recipe.length, folder_of(recipe.calibration),
        recipe.text_field, reading,
    )  # fmt: skip
    found, unseen = make_picture_windows(recipe, rows, reader, GATE_WINDOWS)
    for row in (*found, *unseen):
        check_vocabulary(row["input_ids"], skeleton.vocabulary)
    return found, unseen


def _named(windows: Windows, name: str) -> dict[str, Tensor]:
    """As the file of the windows holds them."""
    if isinstance(windows, Tensor):
        return {name: windows}
    return windows.to_tensors() if name == "windows" else windows.to_tensors(name)


def _describe(windows: Windows, reading: Reading, shown: str) -> str:
    """One sentence: what the windows are, and how the first begins."""
    words = f" of {reading.describe_source()}" if reading.describe_source() else ""
    if isinstance(windows, Tensor):
        return f"calibration: {windows.shape[0]} x {windows.shape[1]} tokens{words}, first: {shown}"
    lengths = [row["input_ids"].shape[1] for row in windows]
    what = f"{len(windows)} rows with {reading.pictures} pictures, {min(lengths)} to {max(lengths)} tokens each"
    return f"calibration: {what},{words}, first: {shown}"


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
    """Draws windows from the source model itself, which is whole in memory for that time: on the run's device, or on
    the CPU where it does not fit there, which is said. What the manifest says of the windows gets the place, since the
    text depends on it. None for an encoder."""
    if not inputs.skeleton.has_lm_head:
        return None
    progress, a_report = inputs.request.progress, 16 * inputs.recipe.samples

    def report(done: int, total: int) -> None:
        if progress is not None and done * 10 // total > (done - a_report) * 10 // total:
            progress(Event("calibrate", message=f"sampled {done:,} of {total:,} tokens from the model itself"))

    def draw(samples: int, length: int, seed: int) -> Tensor:
        device = inputs.request.device
        try:
            return draw_on(device, samples, length, seed)
        except RuntimeError as error:
            if not (has_own_memory(device) and is_out_of_memory(error)):
                raise
        finally:
            release_cached_memory(device)  # the model is gone
        if progress is not None:
            what = f"the whole model, which writes calibration text, does not fit on {device}: it writes on the CPU"
            progress(Event("notice", message=what))
        return draw_on("cpu", samples, length, seed)

    def draw_on(device: str, samples: int, length: int, seed: int) -> Tensor:
        from leangrid.data.sampling import sample_windows
        from leangrid.inference.load import load

        dtype = inputs.skeleton.compute_dtype if has_own_memory(device) else torch.float32
        model, tokenizer = load(inputs.checkpoint.directory, device, dtype)
        drawn = sample_windows(model, tokenizer, samples, length, seed, progress=report)
        inputs.calibration["written_on"] = device
        return drawn

    return draw

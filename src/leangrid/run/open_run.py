"""Before any work: open the source, settle the recipe, refuse what cannot be done, lock the output."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leangrid._version import __version__
from leangrid.data.calibration import decoded_start, doubts, windows_hash
from leangrid.data.calibration import windows as corpus_windows
from leangrid.data.corpora import check, file_of
from leangrid.data.documents import Reading
from leangrid.errors import CalibrationError
from leangrid.machine import memory
from leangrid.machine.devices import checked
from leangrid.models.gguf import all_files, dequantize, describe, is_gguf
from leangrid.models.skeleton import Skeleton
from leangrid.models.tokenizer import load_tokenizer
from leangrid.planning.footprint import choose
from leangrid.planning.settle import narrowed, open_model, settle
from leangrid.planning.sizes import GATE_WINDOWS, disk_bytes
from leangrid.progress import Event, Progress
from leangrid.recipe import Recipe
from leangrid.storage import files
from leangrid.storage.hub import locate_stream
from leangrid.storage.journal import Journal
from leangrid.storage.source import Checkpoint
from leangrid.storage.writer import check_output

_DEFAULT_GROUP = 128


@dataclass
class Prepared:
    """A checked source with its settled recipe and the locked journal of its result."""

    source: str
    out: Path
    checkpoint: Checkpoint
    skeleton: Skeleton
    recipe: Recipe
    journal: Journal
    overwrite: bool
    notices: list[str]
    calibration: dict[str, Any] = field(
        default_factory=dict
    )  # what the manifest says of the windows, once they are there


def prepare(
    source: str | Path,
    out: str | Path,
    recipe: Recipe,
    windows: Tensor | None,
    device: str,
    overwrite: bool,
    restart: bool,
    state_dir: str | Path | None,
    progress: Progress | None,
) -> Prepared:
    """Open and check everything that needs no weights; LeangridError before anything is written (a GGUF source is
    dequantized into ``out.partial/source`` once the output is locked).
    """
    checked(device)
    memory.spare_addresses()
    (path, remote), final = locate_stream(str(source)), Path(out)
    if remote is not None and recipe.calibration == "self":
        raise CalibrationError(
            "a model that is streamed cannot write its own text",
            "--calibration self",
            "Give a text, or download the model",
        )
    check_output(final, path, overwrite)
    if windows is None:
        check(recipe.calibration, recipe.text_field)
    notices: list[str] = []
    if is_gguf(path):
        settle(recipe, Skeleton(describe(path)), device)  # what cannot be done is refused before a weight is read
        identity = {"files": {file.name: {"sha256": file_hash(file)} for file in all_files(path)}}
        journal = _open_journal(final, recipe, identity, windows, restart, state_dir)
        try:
            notices.append(
                f"{path.name}: dequantized before quantizing; the original of all comparisons is the dequantized model"
            )
            directory = journal.partial / "source"
            if not (directory / "config.json").is_file():
                dequantize(path, directory)
                memory.return_free()
            checkpoint, skeleton, settled = open_model(directory, recipe, device)
        except BaseException:
            _give_up(journal)
            raise
    else:
        checkpoint, skeleton, settled = open_model(path, recipe, device, remote)
        side = {
            name: file_hash(file) for name, file in checkpoint.side_files().items()
        }  # another tokenizer is another run
        journal = _open_journal(final, recipe, checkpoint.identity | {"side_files": side}, windows, restart, state_dir)
    samples, length = recipe.samples, recipe.length
    if windows is not None and windows.ndim == 2 and windows.numel():  # others are refused as calibration, later
        samples, length = windows.shape
    _require_disk(journal, skeleton, settled, samples, length, device)
    notices += [*checkpoint.notices, *skeleton.naming.notices, *journal.notices]
    notices += narrowed(settled, skeleton)
    if recipe.scheme == "auto":
        notices.append(f"scheme: {settled.scheme}")
    for notice in notices:
        if progress is not None:
            progress(Event("notice", message=notice))
    return Prepared(str(source), final, checkpoint, skeleton, settled, journal, overwrite, notices)


def check_values(prepared: Prepared) -> None:
    """Look for NaN and infinities in all weights before any work, where the machine can keep what it reads for the
    blocks that follow; in a larger or streamed model each block's are looked at in its turn."""
    checkpoint, skeleton = prepared.checkpoint, prepared.skeleton
    size = sum(skeleton.stored_info(name).nbytes for name in skeleton.parameter_names())
    if checkpoint.remote is None and prepared.journal.is_fresh and size < memory.available_bytes():
        for name in skeleton.parameter_names():
            skeleton.stored(name)


def calibration_windows(prepared: Prepared, given: Tensor | None, progress: Progress | None) -> Tensor:
    """The calibration windows, int64 [samples, length]: given, or from the recipe's corpus; kept beside the journal.

    What the manifest says of them comes to ``prepared.calibration``: source, columns, chat template, how the first
    window begins."""
    journal, recipe, skeleton = prepared.journal, prepared.recipe, prepared.skeleton
    saved = journal.load_named("windows")
    if saved is not None:
        prepared.calibration = json.loads(bytes(saved["account"].tolist())) if "account" in saved else {}
        return saved["windows"]
    positions = getattr(skeleton.config, "max_position_embeddings", None)
    rows = skeleton.base.get_input_embeddings().weight.shape[0]  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    tokenizer = load_tokenizer(prepared.checkpoint.directory)
    reading = Reading(recipe.calibration if given is None else "windows given")
    if given is not None:
        tokens = _checked(given, rows, positions)
        unseen = tokens[:0]
    else:
        sampler = _sampler(prepared, progress)
        found = corpus_windows(
            recipe, tokenizer, sampler, vocab_rows=rows, max_positions=positions, reading=reading, extra=GATE_WINDOWS
        )
        tokens, unseen = found[: recipe.samples], found[recipe.samples :]
        memory.return_free()  # a corpus of tokens with their places in the text is large, and gone now
    shown = None if tokenizer is None else decoded_start(tokenizer, tokens)
    prepared.calibration = {**reading.to_json(), "first": shown}
    account = json.dumps(prepared.calibration, sort_keys=True).encode()
    kept = {"windows": tokens, "account": torch.tensor(list(account), dtype=torch.uint8)}
    journal.save_named("windows", kept | ({"unseen": unseen} if len(unseen) else {}))
    if progress is not None:
        said = doubts(tokenizer, prepared.checkpoint.config, rows) if tokenizer is not None else []
        said += reading.notices()
        if shown is not None:
            words = f" of {reading.words()}" if reading.words() else ""
            said.append(f"calibration: {tokens.shape[0]} x {tokens.shape[1]} tokens{words}, first: {shown}")
        for sentence in said:
            progress(Event("notice", message=sentence))
    return tokens


def _checked(windows: Tensor, rows: int, positions: int | None) -> Tensor:
    if windows.ndim != 2 or windows.dtype != torch.int64 or windows.numel() == 0:
        raise CalibrationError(
            f"windows must be int64 [samples, length], got {windows.dtype} {list(windows.shape)}", "windows"
        )
    if int(windows.min()) < 0 or int(windows.max()) >= rows:
        raise CalibrationError(
            f"token ids must lie in 0..{rows - 1}, got {int(windows.min())}..{int(windows.max())}", "windows"
        )
    if positions and windows.shape[1] > positions:
        raise CalibrationError(f"windows of {windows.shape[1]} tokens, but the model takes {positions}", "windows")
    return windows.contiguous()


def _sampler(prepared: Prepared, progress: Progress | None) -> Callable[[int, int, int], Tensor] | None:
    """Draws windows from the source model itself: the whole model is in memory for that time."""
    if not prepared.skeleton.causal:
        return None

    def sample_windows(samples: int, length: int, seed: int) -> Tensor:
        from leangrid.data.sampling import sample
        from leangrid.inference.load import load

        model, tokenizer = load(prepared.checkpoint.directory, dtype=torch.float32)
        return sample(model, tokenizer, samples, length, seed, progress=told)

    def told(done: int, total: int) -> None:
        if progress is not None and done * 10 // total > (done - samples_a_report) * 10 // total:
            progress(Event("calibrate", message=f"sampled {done:,} of {total:,} tokens from the model itself"))

    samples_a_report = 16 * prepared.recipe.samples
    return sample_windows


def _open_journal(
    out: Path,
    recipe: Recipe,
    source: dict[str, Any],
    windows: Tensor | None,
    restart: bool,
    state_dir: str | Path | None,
) -> Journal:
    identity = {
        "recipe": recipe.model_dump(),
        "source": source,
        "windows": windows_identity(recipe, windows),
        "version": __version__,
    }
    return Journal.beside(out, None if state_dir is None else Path(state_dir)).open(identity, restart)


def windows_identity(recipe: Recipe, windows: Tensor | None) -> str:
    """What the calibration is, known before it is read: the tokens' hash, the file's hash, or the corpus by name."""
    if windows is not None:
        return windows_hash(windows)
    path = file_of(recipe.calibration)
    try:
        return file_hash(path) if path is not None else recipe.calibration
    except OSError as error:
        raise CalibrationError(
            f"the file cannot be read: {error.strerror}", path, "Check the path and its permissions"
        ) from error


def file_hash(path: Path) -> str:
    """sha256 of a file, as hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _require_disk(journal: Journal, skeleton: Skeleton, recipe: Recipe, samples: int, length: int, device: str) -> None:
    """Refuse a run that would fill a disk, before any work; what an unfinished one has written already is not asked for
    again."""
    mapped = choose(skeleton, recipe, samples, length, device)[0].disk_streams
    needed = disk_bytes(skeleton, recipe, samples * length, mapped)
    result = max(0, needed.result - files.bytes_in(journal.partial / "blocks"))
    states = max(0, needed.states - files.bytes_in(journal.states))
    try:
        if files.same_disk(journal.partial, journal.states):
            result, states = result + states, 0
        files.require_space(journal.partial, result)
        files.require_space(journal.states, states)
    except BaseException:
        _give_up(journal)
        raise


def _give_up(journal: Journal) -> None:
    """Take back a run that never began."""
    if journal.is_fresh:
        journal.discard()
    journal.close()

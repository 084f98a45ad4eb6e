"""Before any work: open the source, settle the recipe, refuse what cannot be done, lock the output."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leangrid import gate, memory
from leangrid._version import __version__
from leangrid.data.calibration import decoded_start, doubts, windows_hash
from leangrid.data.calibration import windows as corpus_windows
from leangrid.data.corpora import check, file_of
from leangrid.data.documents import Reading
from leangrid.devices import checked
from leangrid.errors import CalibrationError, FormatError, RecipeError, ShapeError
from leangrid.footprint import choose
from leangrid.formats import EXPORT_ONLY, FORMATS, config_of, mlx
from leangrid.gate_walk import causal
from leangrid.models.gguf import all_files, dequantize, describe, is_gguf
from leangrid.models.skeleton import Skeleton
from leangrid.models.tokenizer import load_tokenizer
from leangrid.precision import best_products, compute_dtype
from leangrid.progress import Event, Progress
from leangrid.recipe import Recipe
from leangrid.sizes import disk_bytes, stored_schemes
from leangrid.storage import files
from leangrid.storage.hub import locate_stream
from leangrid.storage.journal import Journal
from leangrid.storage.remote import Remote
from leangrid.storage.source import Checkpoint, open_source
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
    calibration: dict[str, Any] = field(default_factory=dict)  # what the manifest says of the windows, once they are there


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
            "a model that is streamed cannot write its own text", "--calibration self", "Give a text, or download the model"
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
            notices.append(f"{path.name}: dequantized before quantizing; the original of all comparisons is the dequantized model")
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
        side = {name: file_hash(file) for name, file in checkpoint.side_files().items()}  # another tokenizer is another run
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


def open_model(directory: Path, recipe: Recipe, device: str = "cpu", remote: Remote | None = None) -> tuple[Checkpoint, Skeleton, Recipe]:
    """A directory as checkpoint and skeleton, with the recipe settled for its shapes; refuses what cannot be done."""
    checkpoint = open_source(directory, remote=remote)
    skeleton = Skeleton(checkpoint)
    settled = settle(recipe, skeleton, device)
    skeleton.compute_dtype = compute_dtype(settled.products, skeleton.dtype)
    refuse_impossible(settled, skeleton)
    return checkpoint, skeleton, settled


def settle(recipe: Recipe, skeleton: Skeleton, device: str = "cpu") -> Recipe:
    """Write out every default; ``auto`` becomes W4A16_G128 where all columns divide by 128, else W4A16 (in MLX W4A16_G64 or _G32)."""
    columns = {skeleton.shape(name)[1] for name in skeleton.linear_names(0)}
    fits = [size for size in (_DEFAULT_GROUP, *mlx.GROUPS[1:]) if all(cols % size == 0 for cols in columns)]
    # MLX stores whole rows in groups too, so that narrower ones cost it nothing.
    grouped = bool(fits) and (fits[0] == _DEFAULT_GROUP or recipe.format == "mlx")
    settled = recipe.resolved(f"W4A16_G{fits[0]}" if grouped else "W4A16")
    if settled.products != "auto":
        return settled
    return settled.model_copy(update={"products": best_products(skeleton.dtype, device)})


def refuse_impossible(recipe: Recipe, skeleton: Skeleton) -> None:
    """ShapeError for a group that does not divide, FormatError for what the container cannot hold: names the layer."""
    if recipe.format not in FORMATS or recipe.format in EXPORT_ONLY:
        known = ", ".join(name for name in FORMATS if name not in EXPORT_ONLY)
        then = f"; {recipe.format} by leangrid export, afterwards" if recipe.format in EXPORT_ONLY else ""
        raise FormatError(f"'{recipe.format}' is no format that quantize writes", "--format", f"Choose one of: auto, {known}{then}")
    if recipe.parsed.block and recipe.format != "gguf":
        what = f"{recipe.scheme} is a block type of llama.cpp, which format {recipe.format} does not hold"
        raise FormatError(what, "--format", f"Use format gguf, or a scheme such as W{min(recipe.parsed.bits, 4)}A16_G32")
    for index in range(len(skeleton.blocks)):
        for name in skeleton.linear_names(index):
            rows, cols = skeleton.shape(name)
            scheme = recipe.for_layer(name).parsed
            if scheme.group_size and cols % scheme.group_size and not scheme.block:
                fits = [g for g in (128, 64, 32) if cols % g == 0]
                instead = f"W{scheme.bits}A16_G{fits[0]} or W{scheme.bits}A16" if fits else f"W{scheme.bits}A16"
                raise ShapeError(f"groups of {scheme.group_size} do not divide {cols} columns", name, f"Use {instead}")
            reason = FORMATS[recipe.format].refuse(scheme, name, rows, cols, skeleton.architecture.layer)
            if reason:
                raise FormatError(reason)
    if recipe.layers:
        _refuse_mixture(recipe, skeleton)


def _refuse_mixture(recipe: Recipe, skeleton: Skeleton) -> None:
    """RecipeError for an entry of ``layers`` that names no layer, or parts linears that engines fuse (q, k, v; gate, up)."""
    names = [name for index in range(len(skeleton.blocks)) for name in skeleton.linear_names(index)]
    idle = set(recipe.layers) - {recipe.key_of(name) for name in names}
    if idle:
        raise RecipeError(f"'{min(idle)}' names no layer that is quantized", "layers", f"Names are such as {names[-1]}, or its end")
    for index in range(len(skeleton.blocks)):
        for group in skeleton.groups(index):
            fused = [f"{skeleton.block_name(index)}.{name}" for name in group]
            schemes = {recipe.for_layer(name).scheme for name in fused}
            if len(schemes) > 1:
                shared = ", ".join(name.rpartition(".")[2] for name in fused)
                what = f"{shared} share an input and engines fuse them, so they need one scheme, not {' and '.join(sorted(schemes))}"
                raise RecipeError(what, fused[0], "Name all of them, or none")
    config_of(FORMATS[recipe.format], stored_schemes(skeleton, recipe), [], skeleton.dtype)  # refuses, if it holds one scheme only


def narrowed(recipe: Recipe, skeleton: Skeleton) -> list[str]:
    """One sentence for each width whose layers take another block type than the scheme's, because 256 does not divide it."""
    widths = [skeleton.shape(name)[1] for index in range(len(skeleton.blocks)) for name in skeleton.linear_names(index)]
    return [
        f"{recipe.scheme}: {widths.count(cols)} layers of {cols} columns take {recipe.scheme_name(cols)}, 256 does not divide them"
        for cols in sorted(set(widths))
        if recipe.scheme_name(cols) != recipe.scheme
    ]


def check_values(prepared: Prepared) -> None:
    """Look for NaN and infinities in all weights before any work, where the machine can keep what it reads for the blocks that follow;
    in a larger or streamed model each block's are looked at in its turn."""
    checkpoint, skeleton = prepared.checkpoint, prepared.skeleton
    size = sum(skeleton.stored_info(name).nbytes for name in skeleton.parameter_names())
    if checkpoint.remote is None and prepared.journal.is_fresh and size < memory.available_bytes():
        for name in skeleton.parameter_names():
            skeleton.stored(name)


def calibration_windows(prepared: Prepared, given: Tensor | None, progress: Progress | None) -> Tensor:
    """The calibration windows, int64 [samples, length]: given, or from the recipe's corpus; kept beside the journal.

    What the manifest says of them comes to ``prepared.calibration``: source, columns, chat template, how the first window begins.
    """
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
        found = corpus_windows(recipe, tokenizer, sampler, vocab_rows=rows, max_positions=positions, reading=reading, extra=gate.WINDOWS)
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
        raise CalibrationError(f"windows must be int64 [samples, length], got {windows.dtype} {list(windows.shape)}", "windows")
    if int(windows.min()) < 0 or int(windows.max()) >= rows:
        raise CalibrationError(f"token ids must lie in 0..{rows - 1}, got {int(windows.min())}..{int(windows.max())}", "windows")
    if positions and windows.shape[1] > positions:
        raise CalibrationError(f"windows of {windows.shape[1]} tokens, but the model takes {positions}", "windows")
    return windows.contiguous()


def _sampler(prepared: Prepared, progress: Progress | None) -> Callable[[int, int, int], Tensor] | None:
    """Draws windows from the source model itself: the whole model is in memory for that time."""
    if not causal(prepared.skeleton):
        return None

    def sample_windows(samples: int, length: int, seed: int) -> Tensor:
        from leangrid.data.sampling import sample
        from leangrid.load import load

        model, tokenizer = load(prepared.checkpoint.directory, dtype=torch.float32)
        return sample(model, tokenizer, samples, length, seed, progress=told)

    def told(done: int, total: int) -> None:
        if progress is not None and done * 10 // total > (done - samples_a_report) * 10 // total:
            progress(Event("calibrate", message=f"sampled {done:,} of {total:,} tokens from the model itself"))

    samples_a_report = 16 * prepared.recipe.samples
    return sample_windows


def _open_journal(
    out: Path, recipe: Recipe, source: dict[str, Any], windows: Tensor | None, restart: bool, state_dir: str | Path | None
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
        raise CalibrationError(f"the file cannot be read: {error.strerror}", path, "Check the path and its permissions") from error


def file_hash(path: Path) -> str:
    """sha256 of a file, as hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _require_disk(journal: Journal, skeleton: Skeleton, recipe: Recipe, samples: int, length: int, device: str) -> None:
    """Refuse a run that would fill a disk, before any work; what an unfinished one has written already is not asked for again."""
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

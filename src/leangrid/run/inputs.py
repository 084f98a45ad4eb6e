"""What a run works on, opened and checked before any weight is changed.

One pass, each thing chosen once: locate the source, open its headers as a skeleton, resolve the recipe for its shapes,
open and lock the journal, choose the placement, and see that the disk has room. Bad input raises before anything is
written, or takes back what was.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from leangrid._version import __version__
from leangrid.data.calibration import hash_windows
from leangrid.data.corpora import check_corpus, find_corpus_file
from leangrid.data.files import read_rows
from leangrid.data.picture_windows import picture_files
from leangrid.errors import CalibrationError, RecipeError
from leangrid.machine import memory
from leangrid.machine.devices import has_own_memory, parse_device, usable_device_bytes
from leangrid.mixture import sources_of
from leangrid.models.flow import flows_live
from leangrid.models.gguf import all_files, dequantize, describe, is_gguf
from leangrid.models.skeleton import Skeleton
from leangrid.planning.budget import estimated_recipe
from leangrid.planning.demand import Demand
from leangrid.planning.footprint import choose_placement, sum_footprint
from leangrid.planning.placement import Placement
from leangrid.planning.readers import describe_readers, merges_experts
from leangrid.planning.resolve import describe_narrow_types, describe_own_text, open_checkpoint, resolve_recipe
from leangrid.planning.sizes import GATE_WINDOWS, disk_bytes
from leangrid.planning.structure import describe_choice, describe_fused, describe_left_over
from leangrid.progress import Event
from leangrid.recipe import Recipe
from leangrid.run.request import Request
from leangrid.solve.tuning import count_step_windows
from leangrid.storage import disk, files
from leangrid.storage.hub import locate_stream
from leangrid.storage.journal import Journal
from leangrid.storage.source import Checkpoint
from leangrid.storage.writer import check_output_path

PICTURES = "pictures"  # what the journal has beside the windows where these are rows with pictures
_DEQUANTIZED = "dequantized before quantizing; the original of all comparisons is the dequantized model"


@dataclass
class RunInputs:
    """What a run works on.

    Attributes:
        request: what was asked for.
        checkpoint, skeleton: the source's files, and the model that they hold.
        recipe: the request's, with every default written out for this model.
        journal: what is finished already, locked until the run ends.
        placement: what is on the device and what waits elsewhere.
        notices: sentences that the user has been told.
        calibration: what the manifest says of the windows, once they are there.
        budget: what it says of a budget and of what was chosen within it (budget.py); empty without one.
    """

    request: Request
    checkpoint: Checkpoint
    skeleton: Skeleton
    recipe: Recipe
    journal: Journal
    placement: Placement
    notices: list[str] = field(default_factory=list)
    calibration: dict[str, Any] = field(default_factory=dict)
    budget: dict[str, Any] = field(default_factory=dict)


def open_inputs(request: Request, alone: bool = True) -> RunInputs:
    """Open and check everything that needs no weights.

    A GGUF source is dequantized into ``out.partial/source`` once the output is locked.

    Args:
        alone: whether no other rank follows, which would have to see the finished blocks to compute states again.

    Raises:
        LeangridError: what cannot be done, before anything is written.
    """
    recipe = request.recipe
    parse_device(request.device)
    memory.avoid_heap_holes()
    path, remote = locate_stream(str(request.source))
    if remote is not None and recipe.samples_itself:
        what = "a model that is streamed cannot write its own text"
        raise CalibrationError(what, "--calibration self", "Give a text, or download the model")
    check_output_path(request.out, path, request.overwrite)
    given = request.windows is not None
    if not given:
        for source in sources_of(recipe.calibration):
            check_corpus(source, recipe.column_of(source))
    if is_gguf(path):
        described = Skeleton(describe(path))  # what is asked for is refused before a weight is read
        described.select(recipe.ignore, recipe.only)
        resolve_recipe(recipe, described, request.device)
        source = {"files": {file.name: {"sha256": files.hash_file(file)} for file in all_files(path)}}
        journal = _locked_journal(request, source)
        with _discarded_on_error(journal):
            directory = journal.partial / "source"
            if not (directory / "config.json").is_file():
                dequantize(path, directory)
                memory.return_freed_memory()
            checkpoint, skeleton, resolved = open_checkpoint(directory, recipe, request.device, adds_text=not given)
    else:
        checkpoint, skeleton, resolved = open_checkpoint(path, recipe, request.device, remote, adds_text=not given)
        side = {name: files.hash_file(file) for name, file in checkpoint.side_files().items()}
        journal = _locked_journal(request, checkpoint.identity | {"side_files": side})  # another tokenizer: another run
    journal.keeps_states = not skeleton.structure.flows and journal.load_artifact(PICTURES) is None
    journal.computes_states = alone
    with _discarded_on_error(journal):
        estimated = estimated_recipe(resolved, skeleton)
        placement = _placement(request, skeleton, estimated, journal)
        if journal.read_finished_info() is None:
            _refuse_whole_model(request, skeleton, estimated, placement)
        _require_disk(request, skeleton, estimated, journal, placement)
    notices = [f"{path.name}: {_DEQUANTIZED}"] if is_gguf(path) else []
    notices += [*checkpoint.notices, *skeleton.notices, *journal.notices]
    notices += describe_fused(skeleton, merges_experts(estimated))
    notices += [*describe_left_over(skeleton), *describe_narrow_types(estimated, skeleton), *describe_choice(skeleton)]
    notices += describe_readers(skeleton, estimated)
    notices += [f"scheme: {resolved.scheme}"] if recipe.scheme == "auto" else []
    notices += describe_own_text(recipe, resolved)
    for notice in notices:
        if request.progress is not None:
            request.progress(Event("notice", message=notice))
    return RunInputs(request, checkpoint, skeleton, resolved, journal, placement, notices)


def check_values(inputs: RunInputs) -> None:
    """Look for NaN and infinities in all weights before any work; SourceError names the tensor.

    Only where memory can hold what is read for the blocks that follow: in a larger or streamed model each block's
    weights are looked at when the block is opened.
    """
    checkpoint, skeleton = inputs.checkpoint, inputs.skeleton
    size = sum(skeleton.tensor_info(name).nbytes for name in skeleton.parameter_names())
    if checkpoint.remote is None and inputs.journal.is_fresh and size < memory.available_bytes():
        for name in skeleton.parameter_names():
            skeleton.read(name)


def windows_identity(recipe: Recipe, windows: Tensor | None) -> str:
    """What the calibration is, known before it is read: the tokens' hash, the hash of the file and of the pictures that
    its rows name, or the corpus by name."""
    if windows is not None:
        return hash_windows(windows)
    if recipe.parts:
        return ",".join(f"{windows_identity(recipe.of_part(part), None)}:{part.windows}" for part in recipe.parts)
    path = find_corpus_file(recipe.calibration)
    if path is None:
        return recipe.calibration
    try:
        whole = files.hash_file(path)
    except OSError as error:
        what = f"the file cannot be read: {error.strerror}"
        raise CalibrationError(what, path, "Check the path and its permissions") from error
    pictures = picture_files(read_rows(path), path.parent, recipe.samples + GATE_WINDOWS)
    hashes = [files.hash_file(picture) for picture in pictures if picture.is_file()]
    return " ".join((whole, *hashes)) if hashes else whole


def _locked_journal(request: Request, source: dict[str, Any]) -> Journal:
    identity = {
        "recipe": request.recipe.model_dump(),
        "source": source,
        "windows": windows_identity(request.recipe, request.windows),
        "version": __version__,
    }
    return Journal.for_output(request.out, request.state_dir).start_or_resume(identity, request.restart)


def _placement(request: Request, skeleton: Skeleton, recipe: Recipe, journal: Journal) -> Placement:
    """The one that was asked for, or with which the last finished block ended, or the first that fits."""
    found = _found_placement(request, skeleton, recipe, journal)
    if not recipe.holds_out:
        return found
    return replace(found, windows=count_step_windows(*_windows_shape(request, recipe)))  # steps are bytes of the result


def _refuse_whole_model(request: Request, skeleton: Skeleton, recipe: Recipe, placement: Placement) -> None:
    """RecipeError where the whole model, which guides tuning or is tuned at the end, will not fit in memory."""
    if not recipe.finish and not recipe.draws:
        return
    demand = Demand.of(skeleton, recipe, *_windows_shape(request, recipe), request.device)
    phases, usable = sum_footprint(demand, placement).phases, usable_device_bytes(request.device)
    for phase, name in (("draw", "guide"), ("finish", "finish")):
        needed = sum(phases.get(phase, {}).values())
        if needed > usable:
            what = f"{name} holds the whole model: about {needed / 2**30:.1f} GiB, {usable / 2**30:.1f} GiB can be used"
            raise RecipeError(what, name, f"Use --{name} 0 or a shorter --length, or free memory")


def _found_placement(request: Request, skeleton: Skeleton, recipe: Recipe, journal: Journal) -> Placement:
    if request.placement is not None:
        if request.placement.host_block and flows_live(skeleton) and has_own_memory(request.device):
            what = "the blocks of this model cannot be on the CPU: its own forward is held at them, on the device"
            raise RecipeError(what, "placement: host_block", "Leave it out, or use --device cpu")
        return request.placement
    done = journal.find_resume_point()
    last = journal.read_block_info(done - 1) if done else {}
    if last.get("device") == request.device and "placement" in last:
        return Placement.from_json(last["placement"])
    samples, length = _windows_shape(request, recipe)
    return choose_placement(skeleton, recipe, samples, length, request.device)[0]


def _require_disk(request: Request, skeleton: Skeleton, recipe: Recipe, journal: Journal, placement: Placement) -> None:
    """Refuse a run that would fill a disk; what an unfinished one has written already is not asked for again."""
    samples, length = _windows_shape(request, recipe)
    needed = disk_bytes(skeleton, recipe, samples * length, placement.disk_streams)
    result = max(0, needed.result - disk.bytes_in(journal.partial / "blocks"))
    states = max(0, needed.states - disk.bytes_in(journal.states))
    if disk.same_disk(journal.partial, journal.states):
        result, states = result + states, 0
    disk.require_space(journal.partial, result)
    disk.require_space(journal.states, states)


def _windows_shape(request: Request, recipe: Recipe) -> tuple[int, int]:
    """Samples and length of the windows that will be used; a wrong tensor is refused later, as calibration."""
    given = request.windows
    if given is not None and given.ndim == 2 and given.numel():
        return given.shape[0], given.shape[1]
    return recipe.samples, recipe.length


@contextmanager
def _discarded_on_error(journal: Journal) -> Iterator[None]:
    """Where the body raises, a run that never began leaves nothing behind."""
    try:
        yield
    except BaseException:
        if journal.is_fresh:
            journal.discard()
        journal.close()
        raise

"""How several ranks open one run: rank 0 locks the output and resolves what to do, the others follow it."""

import json
from pathlib import Path
from typing import Any

from leangrid.errors import LeangridError
from leangrid.models.gguf import all_files, is_gguf
from leangrid.planning.resolve import open_checkpoint
from leangrid.run.inputs import RunInputs, open_inputs, windows_identity
from leangrid.run.ranks import Ranks
from leangrid.run.request import Request
from leangrid.storage import files
from leangrid.storage.hub import STREAM, locate_source
from leangrid.storage.journal import Journal
from leangrid.storage.source import open_source


class ReadOnlyJournal(Journal):
    """What rank 0's journal held when the run began; it writes nothing and holds no lock."""

    def __init__(self, partial: Path, state_dir: Path | None, done: int) -> None:
        super().__init__(partial, state_dir)
        self._done = done

    def count_committed(self) -> int:
        """Blocks that were committed when the run began."""
        return self._done

    def find_resume_point(self) -> int:
        """The same."""
        return self._done

    def close(self) -> None:
        """Do nothing: no file is open."""


def open_inputs_on_ranks(request: Request, ranks: Ranks) -> RunInputs:
    """``open_inputs`` on rank 0, once all ranks agree on what to do; the others open the same model as it resolved it.

    Raises:
        LeangridError: the ranks differ in recipe, source, calibration or version; a rank does not see what it has to
            read; or what ``open_inputs`` raises.
    """
    if ranks.count == 1:
        return open_inputs(request)
    if str(request.source).startswith(STREAM):
        ranks.refuse_several("a model that stays on the hub")
    ranks.require_agreement(
        recipe=request.recipe.model_dump_json(),
        source=_source_identity(request),
        calibration=windows_identity(request.recipe, request.windows),
        output=str(request.out),
    )
    inputs = open_inputs(request, alone=False) if ranks.first else None
    try:
        resolved = None
        if inputs is not None:
            directory, journal = inputs.checkpoint.directory, inputs.journal
            resolved = (directory, inputs.recipe, inputs.placement, journal.partial, journal.find_resume_point())
        told: Any = ranks.broadcast(resolved)
        if inputs is not None:
            return inputs
        directory, recipe, placement, partial, done = told
        follower = ReadOnlyJournal(partial, request.state_dir, done)
        checkpoint, skeleton, recipe = open_checkpoint(directory, recipe, request.device, adds_text=False)
        follower.keeps_states = not skeleton.structure.flows
        if not follower.keeps_states and not partial.is_dir():
            raise LeangridError(
                f"rank {ranks.rank} does not see the finished blocks, which this model's states are made of again",
                partial,
                "Put the output on a file system that all ranks share, or use one process",
            )
        return RunInputs(request, checkpoint, skeleton, recipe, follower, placement)
    except BaseException:
        if inputs is not None:
            inputs.journal.close()
        raise


def _source_identity(request: Request) -> str:
    """The same on two ranks where their source has the same files."""
    path = locate_source(str(request.source))
    if is_gguf(path):
        return json.dumps([files.hash_file(file) for file in all_files(path)])
    return json.dumps(open_source(path).identity, sort_keys=True, default=str)

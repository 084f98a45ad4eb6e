"""A rank that is not the first opens the same model for the same work, but holds neither lock nor journal."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from leangrid.models.gguf import all_files, is_gguf
from leangrid.planning.settle import open_model
from leangrid.progress import Progress
from leangrid.recipe import Recipe
from leangrid.run.open_run import Prepared, file_hash, prepare, windows_identity
from leangrid.run.ranks import Ranks
from leangrid.storage.hub import STREAM, locate_source
from leangrid.storage.journal import Journal
from leangrid.storage.source import open_source


class Follower(Journal):
    """What rank 0's journal held at the start; it writes nothing."""

    def __init__(self, partial: Path, state_dir: Path | None, done: int) -> None:
        super().__init__(partial, state_dir)
        self._done = done

    def committed(self) -> int:
        """Blocks that were committed when the run began."""
        return self._done

    def resume_point(self) -> int:
        """The same."""
        return self._done

    def close(self) -> None:
        """Nothing is open."""


def prepare_all(
    source: str | Path,
    out: str | Path,
    recipe: Recipe,
    windows: Tensor | None,
    device: str,
    overwrite: bool,
    restart: bool,
    state_dir: str | Path | None,
    progress: Progress | None,
    ranks: Ranks,
) -> Prepared:
    """``prepare`` on rank 0, once all ranks agree on what to do; the others follow what it settled.

    Raises:
        LeangridError: the ranks differ in recipe, source, calibration or version.
    """
    if ranks.count > 1:
        if str(source).startswith(STREAM):
            ranks.alone("a model that stays on the hub")
        path = locate_source(str(source))
        identity = (
            json.dumps([file_hash(file) for file in all_files(path)])
            if is_gguf(path)
            else json.dumps(open_source(path).identity, sort_keys=True, default=str)
        )
        ranks.agree(
            recipe=recipe.model_dump_json(),
            source=identity,
            calibration=windows_identity(recipe, windows),
            output=str(Path(out)),
        )
    prepared, said = None, None
    if ranks.first:
        prepared = prepare(source, out, recipe, windows, device, overwrite, restart, state_dir, progress)
    try:
        if prepared is not None:
            said = (
                prepared.checkpoint.directory,
                prepared.recipe,
                prepared.journal.partial,
                prepared.journal.resume_point(),
            )
        told: Any = ranks.from_first(said)
        if prepared is not None:
            return prepared
        directory, settled, partial, done = told
        follower = Follower(partial, None if state_dir is None else Path(state_dir), done)
        checkpoint, skeleton, settled = open_model(directory, settled, device)
        return Prepared(str(source), Path(out), checkpoint, skeleton, settled, follower, overwrite, [])
    except BaseException:
        if prepared is not None:
            prepared.journal.close()
        raise

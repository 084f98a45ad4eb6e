"""An OUT that no rename can replace: a mount point, such as a container's volume, or one in a read-only directory.

The run directory is then inside, as ``OUT/.partial``, and at the end its files are moved into OUT one by one,
``manifest.json`` last: without a manifest OUT is no result. After a kill in between, the same command continues
(``writer.finish_interrupted_rename``)."""

import os
from collections.abc import Iterator
from pathlib import Path

from leangrid.storage import disk, files
from leangrid.storage.manifest import MANIFEST, RUN_INSIDE, read_manifest

_NO_CONTENT = {RUN_INSIDE, "lost+found"}  # the second is in every fresh ext4 volume


def cannot_be_replaced(out: Path) -> bool:
    """Whether ``out`` is an existing directory to whose name nothing else can be renamed."""
    return (
        out.is_dir() and not out.is_symlink() and (disk.is_mount(out) or not os.access(out.absolute().parent, os.W_OK))
    )


def is_vacant(out: Path) -> bool:
    """Whether ``out`` is a directory without content. In one that cannot be replaced, the run directory and
    ``lost+found`` are no content."""
    allowed = _NO_CONTENT if cannot_be_replaced(out) else set[str]()
    return out.is_dir() and not out.is_symlink() and {path.name for path in out.iterdir()} <= allowed


def move_result_into(partial: Path, out: Path) -> None:
    """Move the staged result from the run directory ``partial`` into ``out``, after an older result has been moved to
    ``replaced``. Continues where a killed call stopped."""
    staged, replaced = partial / "publish", partial / "replaced"
    names = _names(staged)
    if all((staged / name).exists() for name in names):  # none has been moved yet: what is in OUT is older
        files.make_dir(replaced)
        for path in sorted(_entries(out), key=lambda path: path.name != MANIFEST):
            files.move_into(path, replaced)
    for name in [*sorted(names - {MANIFEST}), MANIFEST]:
        if (staged / name).exists():
            files.move_into(staged / name, out)
    files.remove_if_empty(staged)


def restore_older_result(partial: Path, out: Path) -> None:
    """Undo an unfinished ``move_result_into``: ``out`` holds the older result again, or nothing."""
    replaced = partial / "replaced"
    older = _names(replaced)
    for path in list(_entries(out)):
        if path.name not in older or (replaced / path.name).exists():
            files.remove_tree(path)
    for path in sorted(replaced.iterdir(), key=lambda path: path.name == MANIFEST):
        files.move_into(path, out)


def _names(directory: Path) -> set[str]:
    """The top-level entries of a result according to its manifest; empty if there is no manifest."""
    if not (directory / MANIFEST).exists():
        return set()
    return {name.split("/")[0] for name in read_manifest(directory)["files"]} | {MANIFEST}


def _entries(out: Path) -> Iterator[Path]:
    return (path for path in sorted(out.iterdir()) if path.name not in _NO_CONTENT)

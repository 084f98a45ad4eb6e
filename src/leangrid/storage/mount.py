"""An OUT that no rename can replace: a mount point, such as a container's volume, or a directory whose parent cannot be
written to.

There the run lies inside, as ``OUT/.partial``, and the end moves its files into OUT one by one, ``manifest.json`` last:
without it nothing takes OUT for a result. A kill at any point between is finished by the same command
(``writer.settle``)."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

from leangrid.storage import files

MANIFEST = "manifest.json"
INSIDE = ".partial"
_NO_CONTENT = {INSIDE, "lost+found"}  # the second is in every fresh ext4 volume


def fixed(out: Path) -> bool:
    """Whether ``out`` is there and stays where it is."""
    return (
        out.is_dir() and not out.is_symlink() and (files.is_mount(out) or not os.access(out.absolute().parent, os.W_OK))
    )


def vacant(out: Path) -> bool:
    """Whether ``out`` is a directory with nothing in it but, where it is fixed, what may lie there."""
    allowed = _NO_CONTENT if fixed(out) else set[str]()
    return out.is_dir() and not out.is_symlink() and {path.name for path in out.iterdir()} <= allowed


def fill(partial: Path, out: Path) -> None:
    """Move the staged result into OUT, after an older one has moved into ``replaced``; goes on where a kill stopped
    it."""
    staged, replaced = partial / "publish", partial / "replaced"
    names = _names(staged)
    if all((staged / name).exists() for name in names):  # none has moved yet: what lies in OUT is older
        files.make_dir(replaced)
        for path in sorted(_entries(out), key=lambda path: path.name != MANIFEST):
            files.move_entry(path, replaced)
    for name in [*sorted(names - {MANIFEST}), MANIFEST]:
        if (staged / name).exists():
            files.move_entry(staged / name, out)
    files.remove_if_empty(staged)


def restore(partial: Path, out: Path) -> None:
    """Undo a ``fill`` that did not come to its end: OUT holds the older result again, or nothing."""
    replaced = partial / "replaced"
    older = _names(replaced)
    for path in list(_entries(out)):
        if path.name not in older or (replaced / path.name).exists():
            files.remove_tree(path)
    for path in sorted(replaced.iterdir(), key=lambda path: path.name == MANIFEST):
        files.move_entry(path, out)


def _names(directory: Path) -> set[str]:
    """The entries of a result, by its manifest; empty where there is none."""
    if not (directory / MANIFEST).exists():
        return set()
    listed = json.loads((directory / MANIFEST).read_bytes())["files"]
    return {name.split("/")[0] for name in listed} | {MANIFEST}


def _entries(out: Path) -> Iterator[Path]:
    return (path for path in sorted(out.iterdir()) if path.name not in _NO_CONTENT)

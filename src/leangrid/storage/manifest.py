"""manifest.json: what a finished result consists of, and whether it is still as it was written.

``files`` lists every other file of the directory with its size and sha256; ``seal`` is the sha256 of the manifest
itself without that key, so every changed byte of a result shows."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from leangrid.errors import OutputError, VerifyError
from leangrid.storage import files
from leangrid.storage.side_files import MAX_PARTS, list_missing_modules

MANIFEST = "manifest.json"
RUN_INSIDE = ".partial"  # the directory of an unfinished run inside its OUT (storage/mount.py)
_TEMPORARY = re.compile(r"\.(.+)\.\d+\.[0-9a-f]{8}\.tmp")  # as files.atomic_write names it
_SHOWN = 5  # differences that an error message names


def seal(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with its ``seal``: the sha256, in hex, of its JSON without that key."""
    body = {key: value for key, value in manifest.items() if key != "seal"}
    return {**body, "seal": hashlib.sha256(files.json_bytes(body)).hexdigest()}


def read_manifest(directory: Path) -> dict[str, Any]:
    """The JSON of a directory's manifest; neither its seal nor the files that it lists are compared.

    Raises OSError if there is none or it cannot be read, ValueError if it holds no JSON object."""
    manifest = json.loads((directory / MANIFEST).read_bytes())
    if not isinstance(manifest, dict):
        raise ValueError(f"{MANIFEST} holds no JSON object")
    return manifest


def is_result(directory: Path) -> bool:
    """Whether ``directory`` is a finished result: it holds a manifest whose seal is right."""
    try:
        manifest = read_manifest(directory)
        return not directory.is_symlink() and seal(manifest)["seal"] == manifest["seal"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def list_differences(directory: Path) -> list[str]:
    """Compare a finished directory with its manifest and return one sentence for each difference.

    Found are missing, changed, truncated, extended and additional files, links, and any change of the manifest itself.
    The list is empty for an intact result. Raises VerifyError if there is no such directory."""
    if not directory.is_dir():
        raise VerifyError("there is no such directory", directory)
    try:
        raw = (directory / MANIFEST).read_bytes()
        manifest = json.loads(raw)
        listed, pending = dict(manifest["files"]), dict(manifest.get("pending", {}))
        sealed = seal(manifest)["seal"] == manifest["seal"] and raw == files.json_bytes(manifest)
    except FileNotFoundError:
        return [f"{MANIFEST}: missing, so this is not a finished leangrid result"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return [f"{MANIFEST}: damaged ({type(error).__name__})"]
    differences = [] if sealed else [f"{MANIFEST}: changed since it was written"]
    for name in sorted({*listed, *pending}):
        entries = [entries[name] for entries in (listed, pending) if name in entries]
        found = [_differences(directory, name, entry) for entry in entries]
        # A file that amend_result announced but was killed before writing is no difference.
        not_yet = name not in listed and found[0] == [f"{name}: missing"]
        differences += found[0] if all(found) and not not_yet else []
    present = {
        path.relative_to(directory).as_posix()
        for path in directory.rglob("*")
        if not path.is_dir() or path.is_symlink()
    }
    if (directory / RUN_INSIDE).is_dir():
        differences.append(f"{RUN_INSIDE}: left by an unfinished run, which the same command finishes")
        present = {name for name in present if not name.startswith(f"{RUN_INSIDE}/")}
    known = {*listed, *pending, MANIFEST}
    differences += [
        f"{name}: not in the manifest"
        for name in sorted(present - known)
        if not _is_leftover(name, {*pending, MANIFEST})
    ]
    return differences + list_missing_modules(directory, listed)


def _is_leftover(name: str, announced: set[str]) -> bool:
    """Whether ``name`` is the temporary file of an ``announced`` one, left by a killed ``amend_result``. The next one
    removes it."""
    match = _TEMPORARY.fullmatch(name)
    return match is not None and match[1] in announced


def require_unchanged(directory: Path, but: str = "") -> None:
    """Raise VerifyError, naming the first differences, if a directory is not what its manifest says.

    Differences of the file ``but`` are ignored; "" ignores none."""
    differences = [
        difference for difference in list_differences(directory) if not (but and difference.startswith(f"{but}: "))
    ]
    if differences:
        more = f"; and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
        what = f"the directory is not what its manifest says: {'; '.join(differences[:_SHOWN])}{more}"
        raise VerifyError(what, directory, "Copy it again, or quantize again")


def _differences(directory: Path, name: str, entry: Any) -> list[str]:
    """What differs between the file ``name`` and its ``entry`` in the manifest; at most one sentence."""
    path = directory / name
    if not is_plain_name(name) or not isinstance(entry, dict):
        return [f"{name[:100]!r}: not a plain file name"]
    if path.is_symlink():
        return [f"{name}: a link, not a file"]
    if not path.is_file():
        return [f"{name}: missing"]
    if path.stat().st_size != entry.get("bytes"):
        return [f"{name}: {path.stat().st_size} bytes, the manifest says {entry.get('bytes')}"]
    try:
        return [] if files.hash_file(path) == entry.get("sha256") else [f"{name}: contents changed (sha256 differs)"]
    except OSError as error:
        return [f"{name}: cannot be read ({error.strerror})"]


def amend_result(directory: Path, texts: Mapping[str, bytes], facts: Mapping[str, Any] | None = None) -> None:
    """Add or replace small files (a report, a model card) of a finished directory, and set ``facts`` in its manifest.

    The manifest announces the new files under ``pending`` before they are written, so that a directory is intact at
    every moment, also when this is killed: each file is either the old or the new one.

    Args:
        texts: relative file name -> content.
        facts: keys to set in the manifest; None sets none.

    Raises:
        VerifyError: the directory has no manifest of leangrid, or a changed one.
        OutputError: a name that no file of a result can have, or a write that failed.
    """
    if not is_result(directory):
        raise VerifyError("no leangrid manifest, or a changed one", directory, "leangrid verify shows what differs")
    manifest = read_manifest(directory)
    for name in texts:
        if not is_plain_name(name) or name == MANIFEST or not (directory / name).parent.is_dir():
            raise OutputError(f"the result cannot hold a file called '{name}'", directory)
    written = {
        name: entry for name, entry in manifest.get("pending", {}).items() if not _differences(directory, name, entry)
    }
    manifest["files"] |= written  # what an earlier call that was killed had finished writing
    files.sweep_temporaries(directory)
    pending = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in texts.items()}
    files.write_json(directory / MANIFEST, seal({**manifest, "pending": pending}))
    for name, data in texts.items():
        files.atomic_write(directory / name, data)
    amended = {key: value for key, value in manifest.items() if key != "pending"} | dict(facts or {})
    files.write_json(directory / MANIFEST, seal({**amended, "files": {**manifest["files"], **pending}}))


def is_plain_name(name: str) -> bool:
    """Whether ``name`` may be the relative name of a file in a result: printable, not hidden, not outside of it."""
    parts = PurePosixPath(name).parts
    sound = all(part.isprintable() and not part.startswith((".", "/")) for part in parts)
    return 0 < len(parts) <= MAX_PARTS and "\\" not in name and sound

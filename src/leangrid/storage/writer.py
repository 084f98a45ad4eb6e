"""From the journal to a finished directory: streamed, hashed, named last. A directory called OUT is always complete.

Everything is put together in ``OUT.partial/publish`` with ``manifest.json`` last, then one rename makes it OUT (an
empty OUT too; a mount point is filled, see storage/mount.py); only after that is durable does the journal go.
``verify`` holds a directory against its manifest; the manifest holds its own sha256 too, so every changed byte shows.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor

from leangrid.errors import FormatError, Interrupted, OutputError, VerifyError
from leangrid.storage import files, safetensors
from leangrid.storage.failpoints import failpoint
from leangrid.storage.journal import Journal, partial_of
from leangrid.storage.mount import INSIDE, MANIFEST, fill, vacant
from leangrid.storage.safetensors import Source, TensorInfo
from leangrid.storage.side_files import DEEPEST, missing_modules, without_code

INDEX = "model.safetensors.index.json"
_TEMPORARY = re.compile(r"\.(.+)\.\d+\.[0-9a-f]{8}\.tmp")  # as files.atomic_write names it
_SHOWN = 5  # differences that a refusal names
Views = Callable[[Mapping[str, Any]], Mapping[str, str]]  # the manifest so far, with ``files`` -> file name -> text


def publish(journal: Journal, out: Path, head_tensors: Iterable[tuple[str, Tensor | TensorInfo]], config: Mapping[str, Any],
            side_files: Mapping[str, Path], texts: Mapping[str, str], manifest: Mapping[str, Any], *, overwrite: bool = False,
            shard_bytes: int = 2 << 30, judge: Callable[[Path], Mapping[str, Any]] | None = None,
            views: Views | None = None) -> dict[str, Any]:  # fmt: skip
    """Make ``out`` of all committed blocks and what is outside of them; return the manifest.

    ``head_tensors``: name and tensor of everything that is in no block (embeddings, final norm, head); a TensorInfo is
    copied from where it lies, a Tensor is spooled to disk before the next is asked for, so memory holds one at a time.
    ``side_files``: relative name -> file to copy. ``texts``: file name -> text (README.md, records.jsonl). ``config``
    goes without ``auto_map``. ``manifest`` gets ``files`` (name -> bytes, sha256), ``seal``, and what ``judge`` says of
    the written directory before it gets its name; ``views`` are texts made of all that. Raises OutputError, with every
    block safe, if anything cannot be written or ``out`` exists and ``overwrite`` is off."""
    staged = stage(journal)
    try:
        sources = _sources(journal, head_tensors)
        listed = _write_shards(staged, sources, shard_bytes)
        for name, path in side_files.items():
            files.make_dir((staged / name).parent)
            _add(
                staged, listed, name, _without_code(path) if name.endswith("_config.json") else files.read_chunks(path)
            )
        for name, text in texts.items():
            _add(staged, listed, name, text.encode())
    except files.SourceReadError as error:
        way_out = f"{'Finished blocks are kept; run' if journal.committed() else 'Run'} the same command again"
        raise Interrupted(f"cannot read: {error.strerror}", error.filename, way_out) from error
    _add(
        staged,
        listed,
        "config.json",
        files.json_bytes({key: value for key, value in config.items() if key != "auto_map"}),
    )
    judged = {} if judge is None else judge(staged)
    return _name(journal, staged, out, listed, {**manifest, **judged}, overwrite, views)


def stage(journal: Journal) -> Path:
    """An empty directory inside the journal in which a result is put together."""
    for leftover in ("sealed.json", "publish", "head"):
        files.remove_tree(journal.partial / leftover)
    files.make_dir(journal.partial / "publish")
    return journal.partial / "publish"


def publish_staged(
    journal: Journal,
    out: Path,
    texts: Mapping[str, str],
    manifest: Mapping[str, Any],
    *,
    overwrite: bool = False,
    views: Views | None = None,
) -> dict[str, Any]:
    """Make ``out`` of what already lies in the directory that ``stage`` gave, and ``texts``; return the manifest, as
    ``publish`` does."""
    staged = journal.partial / "publish"
    listed: dict[str, dict[str, Any]] = {}
    for path in sorted(path for path in staged.rglob("*") if path.is_file()):
        listed[path.relative_to(staged).as_posix()] = {"bytes": path.stat().st_size, "sha256": files.hash_file(path)}
    for name, text in texts.items():
        _add(staged, listed, name, text.encode())
    return _name(journal, staged, out, listed, manifest, overwrite, views)


def _name(
    journal: Journal,
    staged: Path,
    out: Path,
    listed: dict[str, Any],
    manifest: Mapping[str, Any],
    overwrite: bool,
    views: Views | None,
) -> dict[str, Any]:
    """The end of every result: what is told of it, manifest, rename, and only then no journal."""
    told = {} if views is None else views({**manifest, "files": dict(listed)})
    for name, text in told.items():
        _add(staged, listed, name, text.encode())
    failpoint("publish.before_manifest")
    sealed = _seal({**manifest, "files": listed})
    sha256 = files.write_json(staged / MANIFEST, sealed)
    files.write_json(journal.partial / "sealed.json", {"manifest": sha256})
    _replace(journal, staged, out, overwrite)
    journal.discard()
    return sealed


def _sources(journal: Journal, head_tensors: Iterable[tuple[str, Tensor | TensorInfo]]) -> dict[str, Source]:
    """Every tensor of the result, by name, as a place on disk."""
    sources: dict[str, Source] = {}

    def add(name: str, info: Source) -> None:
        if name in sources:
            raise FormatError(f"two tensors of the result are called '{name}'", journal.partial)
        sources[name] = info

    for index in range(journal.committed()):
        for name, info in journal.block_tensors(index).items():
            add(name, info)
    files.make_dir(journal.partial / "head")
    for position, (name, value) in enumerate(head_tensors):
        if isinstance(value, Tensor):
            spool = journal.partial / "head" / f"{position:04d}.safetensors"
            safetensors.save(spool, {name: value})
            value = safetensors.read_header(spool)[name]
        add(name, value)
    return sources


def _write_shards(staged: Path, sources: Mapping[str, Source], shard_bytes: int) -> dict[str, dict[str, Any]]:
    """Write the tensors, in order, into shards of at most ``shard_bytes`` (one tensor may exceed it); return their
    manifest entries."""
    shards: list[dict[str, Source]] = [{}]
    filled = total = 0
    for name, source in sources.items():
        if shards[-1] and filled + source.nbytes > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = source
        filled += source.nbytes
        total += source.nbytes
    listed: dict[str, dict[str, Any]] = {}
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        sha256 = safetensors.save(staged / name, shard, {"format": "pt"})
        listed[name] = {"bytes": (staged / name).stat().st_size, "sha256": sha256}
        weight_map.update(dict.fromkeys(shard, name))
        failpoint("publish.after_shard")
    if len(shards) > 1:
        _add(staged, listed, INDEX, files.json_bytes({"metadata": {"total_size": total}, "weight_map": weight_map}))
    return listed


def _add(
    staged: Path, listed: dict[str, dict[str, Any]], name: str, chunks: files.Bytes | Iterable[files.Bytes]
) -> None:
    if not _plain(name) or name in listed or name == MANIFEST:
        raise OutputError(f"the result cannot hold a file called '{name}'", staged)
    sha256 = files.atomic_write(staged / name, chunks)
    listed[name] = {"bytes": (staged / name).stat().st_size, "sha256": sha256}


def _without_code(path: Path) -> bytes:
    """The config of a tokenizer or processor less its ``auto_map``; byte for byte where it has none."""
    raw = b"".join(bytes(piece) for piece in files.read_chunks(path))
    try:
        value = json.loads(raw)
        plain = without_code(value)
    except (ValueError, RecursionError):
        return raw
    return raw if plain == value else files.json_bytes(plain)


def _seal(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with the sha256 of itself (without ``seal``)."""
    body = {key: value for key, value in manifest.items() if key != "seal"}
    return {**body, "seal": hashlib.sha256(files.json_bytes(body)).hexdigest()}


def _replace(journal: Journal, staged: Path, out: Path, overwrite: bool) -> None:
    older = (out.exists() or out.is_symlink()) and not vacant(out)
    if older and not (overwrite and _ours(out)):
        raise _exists(out, resumable=True)
    files.remove_tree(journal.partial / "replaced")
    if journal.partial.parent == out:
        return fill(journal.partial, out)
    if older:
        files.move_dir(out, journal.partial / "replaced")
    files.move_dir(staged, out)  # an empty directory is replaced by the same rename
    return None


def settle(out: Path, state_dir: Path | None = None) -> dict[str, Any] | None:
    """Finish what a kill between the last rename and the end left: if ``out`` is the published result of the run in
    ``OUT.partial``, remove that journal and return the manifest; else None. A result that was being moved into a mount
    point is moved to its end first. Call it before ``check_output``."""
    partial = partial_of(out)
    if _half_moved(partial, out):
        with Journal(partial, state_dir) as journal:
            journal.lock()
            if _half_moved(partial, out):  # and nobody else has done it
                fill(partial, out)
    if _ours(out) and partial.is_dir() and {path.name for path in partial.iterdir()} <= {"LOCK"}:
        Journal(partial, state_dir).discard()  # its end or its beginning; either way nothing is in it
        return None
    try:
        sealed = json.loads((partial / "sealed.json").read_bytes())["manifest"]
        if any((partial / "publish").glob("*")) or files.hash_file(out / MANIFEST) != sealed:
            return None
        manifest = json.loads((out / MANIFEST).read_bytes())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    Journal(partial, state_dir).discard()
    return manifest


def _half_moved(partial: Path, out: Path) -> bool:
    """Whether a complete result waits inside OUT to be moved to its place there."""
    try:
        sealed = json.loads((partial / "sealed.json").read_bytes())["manifest"]
        return partial.parent == out and files.hash_file(partial / "publish" / MANIFEST) == sealed
    except (OSError, ValueError, KeyError, TypeError):
        return False


def check_output(out: Path, source: Path, overwrite: bool = False) -> None:
    """Refuse (OutputError, nothing touched) an output that exists, is the source, or lies in it or around it. An empty
    directory is allowed, also one that is a mount point; ``overwrite`` allows one that carries our manifest."""
    partial = partial_of(out)  # refuses a path without a name
    target = out.resolve()
    for path in (target, partial.resolve()):
        if source.exists():
            inside = [ancestor for ancestor in (path, *path.parents) if ancestor.exists() and ancestor.samefile(source)]
            if inside:
                raise OutputError(
                    "the output is the source, or lies inside it", out, "Choose a directory outside the source"
                )
        if source.resolve().is_relative_to(path) and source.is_dir():
            raise OutputError("the source lies inside the output", out, "Choose a directory outside the source")
    if out.is_symlink():
        raise OutputError("the output is a symbolic link", out, "Give the real directory, or a new name")
    if out.exists() and not vacant(out) and not (overwrite and _ours(out)):
        raise _exists(out)
    for parent in target.parents:
        if parent.exists():
            if not parent.is_dir():
                raise OutputError(
                    "a file is in the way of the output directory", parent, "Choose another output directory"
                )
            break


def _ours(directory: Path) -> bool:
    """Whether a directory carries a manifest that leangrid wrote (its seal says so)."""
    try:
        manifest = json.loads((directory / MANIFEST).read_bytes())
        return not directory.is_symlink() and _seal(manifest)["seal"] == manifest["seal"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _exists(out: Path, resumable: bool = False) -> OutputError:
    if _ours(out):
        way_out = "Check it with: leangrid verify; replace it with --overwrite"
    elif resumable:
        way_out = "It appeared during the run. Move it away and run the same command again: it resumes"
    else:
        way_out = "Choose another name or remove it; --overwrite only replaces directories that leangrid made"
    held = sorted(path.name for path in out.iterdir())[:3] if out.is_dir() and not out.is_symlink() else []
    error = OutputError("the output exists already" + (f" and holds {', '.join(held)}" if held else ""), out, way_out)
    error.exit_code = 3 if resumable else error.exit_code
    return error


def verify(directory: Path) -> list[str]:
    """What differs between a finished directory and its manifest, one sentence each; empty if nothing does.

    Missing, changed, truncated, appended and additional files, links, and any change of the manifest itself are found.
    Raises VerifyError if there is no such directory.
    """
    if not directory.is_dir():
        raise VerifyError("there is no such directory", directory)
    try:
        raw = (directory / MANIFEST).read_bytes()
        manifest = json.loads(raw)
        listed, pending = dict(manifest["files"]), dict(manifest.get("pending", {}))
        sealed = _seal(manifest)["seal"] == manifest["seal"] and raw == files.json_bytes(manifest)
    except FileNotFoundError:
        return [f"{MANIFEST}: missing, so this is not a finished leangrid result"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return [f"{MANIFEST}: damaged ({type(error).__name__})"]
    differences = [] if sealed else [f"{MANIFEST}: changed since it was written"]
    for name in sorted({*listed, *pending}):
        entries = [entries[name] for entries in (listed, pending) if name in entries]
        found = [_differences(directory, name, entry) for entry in entries]
        not_yet = name not in listed and found[0] == [
            f"{name}: missing"
        ]  # what ``amend`` announced, and a kill came first
        differences += found[0] if all(found) and not not_yet else []
    present = {
        path.relative_to(directory).as_posix()
        for path in directory.rglob("*")
        if not path.is_dir() or path.is_symlink()
    }
    if (directory / INSIDE).is_dir():
        differences.append(f"{INSIDE}: left by an unfinished run, which the same command finishes")
        present = {name for name in present if not name.startswith(f"{INSIDE}/")}
    known = {*listed, *pending, MANIFEST}
    differences += [
        f"{name}: not in the manifest" for name in sorted(present - known) if not _begun(name, {*pending, MANIFEST})
    ]
    return differences + missing_modules(directory, listed)


def _begun(name: str, coming: set[str]) -> bool:
    """Whether a file is what a killed ``amend`` left of one that it was writing; the next one sweeps it."""
    match = _TEMPORARY.fullmatch(name)
    return match is not None and match[1] in coming


def require_sound(directory: Path, but: str = "") -> None:
    """VerifyError, in one sentence, where a directory is not what its manifest says; differences of the file ``but``
    are none."""
    differences = [difference for difference in verify(directory) if not (but and difference.startswith(f"{but}: "))]
    if differences:
        more = f"; and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
        what = f"the directory is not what its manifest says: {'; '.join(differences[:_SHOWN])}{more}"
        raise VerifyError(what, directory, "Copy it again, or quantize again")


def _differences(directory: Path, name: str, entry: Any) -> list[str]:
    path = directory / name
    if not _plain(name) or not isinstance(entry, dict):
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


def amend(directory: Path, texts: Mapping[str, bytes], facts: Mapping[str, Any] | None = None) -> None:
    """Add or replace small files (a report, a model card) of a finished directory, and set ``facts`` in its manifest.

    The manifest first says what is coming, so that a directory whose amendment was killed still verifies, as before or
    as after. Raises VerifyError if the manifest is not ours, OutputError for a name that no result can have."""
    if not _ours(directory):
        raise VerifyError("no leangrid manifest, or a changed one", directory, "leangrid verify shows what differs")
    manifest = json.loads((directory / MANIFEST).read_bytes())
    for name in texts:
        if not _plain(name) or name == MANIFEST or not (directory / name).parent.is_dir():
            raise OutputError(f"the result cannot hold a file called '{name}'", directory)
    arrived = {
        name: entry for name, entry in manifest.get("pending", {}).items() if not _differences(directory, name, entry)
    }
    manifest["files"] |= arrived
    files.sweep_temporaries(directory)
    coming = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in texts.items()}
    files.write_json(directory / MANIFEST, _seal({**manifest, "pending": coming}))
    for name, data in texts.items():
        files.atomic_write(directory / name, data)
    done = {key: value for key, value in manifest.items() if key != "pending"} | dict(facts or {})
    files.write_json(directory / MANIFEST, _seal({**done, "files": {**manifest["files"], **coming}}))


def _plain(name: str) -> bool:
    parts = PurePosixPath(name).parts
    sound = all(part.isprintable() and not part.startswith((".", "/")) for part in parts)
    return 0 < len(parts) <= DEEPEST and "\\" not in name and sound

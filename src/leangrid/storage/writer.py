"""Makes a finished result out of a journal. A directory called OUT is always complete.

The result is written to ``OUT.partial/publish``, with ``manifest.json`` as the last file, and then renamed to OUT. An
empty OUT is replaced by the same rename; where OUT cannot be replaced, the files are moved into it (storage/mount.py).
The journal is removed only after the rename is durable."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from leangrid.errors import FormatError, Interrupted, OutputError
from leangrid.storage import files, safetensors
from leangrid.storage.failpoints import failpoint
from leangrid.storage.journal import Journal, partial_of
from leangrid.storage.manifest import MANIFEST, is_plain_name, is_result, read_manifest, seal
from leangrid.storage.mount import is_vacant, move_result_into
from leangrid.storage.safetensors import Source, TensorInfo
from leangrid.storage.side_files import remove_auto_map

INDEX = "model.safetensors.index.json"
# From the manifest so far, which has ``files``, to further text files by name.
Views = Callable[[Mapping[str, Any]], Mapping[str, str]]


def write_result(
    journal: Journal,
    out: Path,
    outside_tensors: Iterable[tuple[str, Tensor | TensorInfo]],
    config: Mapping[str, Any],
    side_files: Mapping[str, Path],
    texts: Mapping[str, str],
    manifest: Mapping[str, Any],
    *,
    overwrite: bool = False,
    shard_bytes: int = 2 << 30,
    judge: Callable[[Path], Mapping[str, Any]] | None = None,
    views: Views | None = None,
) -> dict[str, Any]:
    """Write the result ``out`` from all committed blocks and the tensors outside of them; return its manifest.

    Args:
        outside_tensors: name and value of each tensor that is in no block (embeddings, final norm, head). A TensorInfo
            is copied from its file; a Tensor is written to disk before the next is requested, so that memory holds one.
        config: the content of config.json; its ``auto_map`` is left out.
        side_files: relative name -> file to copy.
        texts: file name -> text, such as README.md and records.jsonl.
        manifest: what the manifest says besides ``files`` (name -> bytes, sha256) and ``seal``.
        overwrite: replace an older result of leangrid at ``out``.
        shard_bytes: largest size of a safetensors file; a single larger tensor has a file to itself.
        judge: is given the written directory before it is renamed, and returns more entries for the manifest.
        views: makes further text files from the manifest.

    Raises:
        OutputError: something cannot be written, or ``out`` exists and may not be replaced. Every block is safe.
        Interrupted: a tensor or file of the source cannot be read.
    """
    staged = make_staging_directory(journal)
    try:
        sources = _sources(journal, outside_tensors)
        listed = _write_shards(staged, sources, shard_bytes)
        for name, path in side_files.items():
            files.make_dir((staged / name).parent)
            content = _without_code(path) if name.endswith("_config.json") else files.read_chunks(path)
            _add(staged, listed, name, content)
        for name, text in texts.items():
            _add(staged, listed, name, text.encode())
    except files.SourceReadError as error:
        way_out = f"{'Finished blocks are kept; run' if journal.count_committed() else 'Run'} the same command again"
        raise Interrupted(f"cannot read: {error.strerror}", error.filename, way_out) from error
    safe_config = {key: value for key, value in config.items() if key != "auto_map"}
    _add(staged, listed, "config.json", files.json_bytes(safe_config))
    judged = {} if judge is None else judge(staged)
    return _seal_and_rename(journal, staged, out, listed, {**manifest, **judged}, overwrite, views)


def make_staging_directory(journal: Journal) -> Path:
    """Make the empty directory inside the journal in which a result is written before it is renamed; return it."""
    for leftover in ("sealed.json", "publish", "head"):
        files.remove_tree(journal.partial / leftover)
    files.make_dir(journal.partial / "publish")
    return journal.partial / "publish"


def write_staged_result(
    journal: Journal,
    out: Path,
    texts: Mapping[str, str],
    manifest: Mapping[str, Any],
    *,
    overwrite: bool = False,
    views: Views | None = None,
) -> dict[str, Any]:
    """Write the result ``out`` from the files that are already in the staging directory, and ``texts``.

    For containers that are written as a whole, such as GGUF. Arguments, return value and errors are those of
    ``write_result``."""
    staged = journal.partial / "publish"
    listed: dict[str, dict[str, Any]] = {}
    for path in sorted(path for path in staged.rglob("*") if path.is_file()):
        listed[path.relative_to(staged).as_posix()] = {"bytes": path.stat().st_size, "sha256": files.hash_file(path)}
    for name, text in texts.items():
        _add(staged, listed, name, text.encode())
    return _seal_and_rename(journal, staged, out, listed, manifest, overwrite, views)


def _seal_and_rename(
    journal: Journal,
    staged: Path,
    out: Path,
    listed: dict[str, Any],
    manifest: Mapping[str, Any],
    overwrite: bool,
    views: Views | None,
) -> dict[str, Any]:
    """The last steps of every result: the views, the manifest, the rename, and the removal of the journal."""
    texts = {} if views is None else views({**manifest, "files": dict(listed)})
    for name, text in texts.items():
        _add(staged, listed, name, text.encode())
    failpoint("publish.before_manifest")
    sealed = seal({**manifest, "files": listed})
    sha256 = files.write_json(staged / MANIFEST, sealed)
    files.write_json(journal.partial / "sealed.json", {"manifest": sha256})
    _replace(journal, staged, out, overwrite)
    journal.discard()
    return sealed


def _sources(journal: Journal, outside_tensors: Iterable[tuple[str, Tensor | TensorInfo]]) -> dict[str, Source]:
    """Where each tensor of the result is on disk, by name; those in memory are written to files first."""
    sources: dict[str, Source] = {}

    def add(name: str, info: Source) -> None:
        if name in sources:
            raise FormatError(f"two tensors of the result are called '{name}'", journal.partial)
        sources[name] = info

    for index in range(journal.count_committed()):
        for name, info in journal.locate_block_tensors(index).items():
            add(name, info)
    files.make_dir(journal.partial / "head")
    for position, (name, value) in enumerate(outside_tensors):
        if isinstance(value, Tensor):
            spool = journal.partial / "head" / f"{position:04d}.safetensors"
            safetensors.save(spool, {name: value})
            value = safetensors.read_tensor_infos(spool)[name]
        add(name, value)
    return sources


def _write_shards(staged: Path, sources: Mapping[str, Source], shard_bytes: int) -> dict[str, dict[str, Any]]:
    """Write the tensors, in order, to files of at most ``shard_bytes``, and the index if there are several.

    Returns the manifest entries of these files. A tensor larger than ``shard_bytes`` has a file to itself."""
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
    """Write one file of the result and enter it in ``listed``; OutputError for a name that no result can have."""
    if not is_plain_name(name) or name in listed or name == MANIFEST:
        raise OutputError(f"the result cannot hold a file called '{name}'", staged)
    sha256 = files.atomic_write(staged / name, chunks)
    listed[name] = {"bytes": (staged / name).stat().st_size, "sha256": sha256}


def _without_code(path: Path) -> bytes:
    """The config of a tokenizer or processor without its ``auto_map``; its own bytes if it has none."""
    raw = b"".join(bytes(piece) for piece in files.read_chunks(path))
    try:
        value = json.loads(raw)
        plain = remove_auto_map(value)
    except (ValueError, RecursionError):
        return raw
    return raw if plain == value else files.json_bytes(plain)


def _replace(journal: Journal, staged: Path, out: Path, overwrite: bool) -> None:
    """Give the staged result its name, after an older result has been moved into the journal's ``replaced``."""
    older = (out.exists() or out.is_symlink()) and not is_vacant(out)
    if older and not (overwrite and is_result(out)):
        raise _exists(out, resumable=True)
    files.remove_tree(journal.partial / "replaced")
    if journal.partial.parent == out:
        return move_result_into(journal.partial, out)
    if older:
        files.rename_dir(out, journal.partial / "replaced")
    files.rename_dir(staged, out)  # an empty directory is replaced by the same rename
    return None


def finish_interrupted_rename(out: Path, state_dir: Path | None = None) -> dict[str, Any] | None:
    """Finish a run that was killed after its result was complete, and return the manifest of that result.

    If ``out`` is the result of the run in ``OUT.partial``, its journal is removed; if the result was being moved into
    an OUT that cannot be replaced (storage/mount.py), it is moved completely first. None if there is no such run. Call
    this before ``check_output_path``, which refuses an ``out`` that exists."""
    partial = partial_of(out)
    if _half_moved(partial, out):
        with Journal(partial, state_dir) as journal:
            journal.acquire_lock()
            if _half_moved(partial, out):  # and nobody else has done it
                move_result_into(partial, out)
    if is_result(out) and partial.is_dir() and {path.name for path in partial.iterdir()} <= {"LOCK"}:
        Journal(partial, state_dir).discard()  # a run that had just ended or just begun: it holds nothing
        return None
    try:
        sealed = json.loads((partial / "sealed.json").read_bytes())["manifest"]
        if any((partial / "publish").glob("*")) or files.hash_file(out / MANIFEST) != sealed:
            return None
        manifest = read_manifest(out)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    Journal(partial, state_dir).discard()
    return manifest


def _half_moved(partial: Path, out: Path) -> bool:
    """Whether a complete result is still, in part or whole, in the run directory inside OUT."""
    try:
        sealed = json.loads((partial / "sealed.json").read_bytes())["manifest"]
        return partial.parent == out and files.hash_file(partial / "publish" / MANIFEST) == sealed
    except (OSError, ValueError, KeyError, TypeError):
        return False


def check_output_path(out: Path, source: Path, overwrite: bool = False) -> None:
    """Raise OutputError if ``out`` may not be written: it exists, is the source, or one contains the other.

    Nothing is changed. An empty directory is allowed, also a mount point; ``overwrite`` also allows a result that
    leangrid made."""
    partial = partial_of(out)  # raises OutputError for a path without a name
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
    if out.exists() and not is_vacant(out) and not (overwrite and is_result(out)):
        raise _exists(out)
    for parent in target.parents:
        if parent.exists():
            if not parent.is_dir():
                raise OutputError(
                    "a file is in the way of the output directory", parent, "Choose another output directory"
                )
            break


def _exists(out: Path, resumable: bool = False) -> OutputError:
    """The error for an output that exists; ``resumable``: it appeared during the run, which can be finished later."""
    if is_result(out):
        way_out = "Check it with: leangrid verify; replace it with --overwrite"
    elif resumable:
        way_out = "It appeared during the run. Move it away and run the same command again: it resumes"
    else:
        way_out = "Choose another name or remove it; --overwrite only replaces directories that leangrid made"
    held = sorted(path.name for path in out.iterdir())[:3] if out.is_dir() and not out.is_symlink() else []
    error = OutputError("the output exists already" + (f" and holds {', '.join(held)}" if held else ""), out, way_out)
    error.exit_code = 3 if resumable else error.exit_code
    return error

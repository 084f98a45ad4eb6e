"""Finds the checkpoint that a name stands for: a directory, a .gguf file, or a hub id such as ``org/name@revision``.

``stream:org/name`` is a hub id whose weights are not downloaded: they are read over the network when they are needed
(storage/remote.py)."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from leangrid.errors import CheckpointError
from leangrid.storage.gguf_header import begins_as_gguf
from leangrid.storage.remote import Remote
from leangrid.storage.side_files import list_module_patterns
from leangrid.storage.source import ALLOWED_DOWNLOADS

STREAM = "stream:"
_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")


def locate_source(text: str) -> Path:
    """The checkpoint directory or .gguf file that ``text`` stands for.

    Of a hub id, the files that leangrid reads are downloaded, or found in the hub's cache, also offline. Raises
    CheckpointError, saying what was tried, if there is no such source."""
    if text.startswith(STREAM):
        raise CheckpointError(
            "only plan and quantize read a model as a stream",
            text,
            f"Give {text.removeprefix(STREAM)}: it is downloaded",
        )
    if not text.strip():
        raise CheckpointError(
            "the name of the source is empty", None, "Give a checkpoint directory, a hub id or a .gguf file"
        )
    path = Path(text).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix.lower() == ".gguf" or begins_as_gguf(path):
            return path
        raise CheckpointError("a single file is no checkpoint", path, f"Give the directory: {path.parent}")
    match = _HUB_ID.fullmatch(text)
    if match is None or path.suffix.lower() in (".gguf", ".safetensors"):
        raise CheckpointError(
            "there is no such directory or .gguf file", text, "A hub id looks like org/name or org/name@revision"
        )
    return _download(match["repo"], match["revision"], ALLOWED_DOWNLOADS)


def locate_stream(text: str) -> tuple[Path, Remote | None]:
    """As ``locate_source``, but ``stream:org/name[@revision]`` is allowed too.

    Returns the directory or file and, for ``stream:``, the hub model that has the weights; None otherwise."""
    if not text.startswith(STREAM):
        return locate_source(text), None
    match = _HUB_ID.fullmatch(text.removeprefix(STREAM))
    if match is None:
        raise CheckpointError(
            "what is streamed is a hub id", text, "It looks like stream:org/name or stream:org/name@revision"
        )
    with _translate_errors(text.removeprefix(STREAM)):
        remote = Remote.list_files(match["repo"], match["revision"])
    small = tuple(pattern for pattern in ALLOWED_DOWNLOADS if not pattern.endswith(".safetensors"))
    return _download(match["repo"], remote.commit, small), remote


def _download(repo: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    """Download the files of a hub model that match, and its sentence-transformers modules; return their directory."""
    from huggingface_hub import snapshot_download  # heavy, and only hub ids need it

    with _translate_errors(f"{repo}@{revision}" if revision else repo):
        directory = Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns)))
        further = list_module_patterns(directory)
        return Path(snapshot_download(repo, revision=revision, allow_patterns=further)) if further else directory


@contextmanager
def _translate_errors(name: str) -> Iterator[None]:
    """Turn the errors of the hub's client into CheckpointErrors about ``name``."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise CheckpointError(
            "the hub wants its terms accepted first", name, "Accept them there, then: hf auth login"
        ) from None
    except errors.RevisionNotFoundError:
        raise CheckpointError("the hub knows no such revision", name) from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(
            "neither a directory nor a public model of the hub", name, "If it is private: hf auth login"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, OSError) as error:
        raise CheckpointError(f"not in the hub's cache, and the hub cannot be reached ({type(error).__name__})", name,
                              "Connect once, or give a directory") from error  # fmt: skip

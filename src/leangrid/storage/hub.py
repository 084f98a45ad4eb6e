"""From what the user typed to a place on disk: a directory, a .gguf file, or a hub id such as ``org/name@revision``."""

import re
from pathlib import Path

from leangrid.errors import CheckpointError
from leangrid.storage.source import ALLOWED_DOWNLOADS

_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")


def locate_source(text: str) -> Path:
    """The checkpoint directory or .gguf file meant by ``text``; a hub id is downloaded (or found in the hub's cache, also offline),
    only files that leangrid reads. Raises CheckpointError saying what was tried."""
    path = Path(text).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix == ".gguf":
            return path
        raise CheckpointError("a single file is no checkpoint", path, f"Give the directory: {path.parent}")
    match = _HUB_ID.fullmatch(text)
    if match is None or path.suffix in (".gguf", ".safetensors"):
        raise CheckpointError("there is no such directory or .gguf file", text, "A hub id looks like org/name or org/name@revision")
    return _download(match["repo"], match["revision"])


def _download(repo: str, revision: str | None) -> Path:
    from huggingface_hub import errors, snapshot_download  # heavy, and only hub ids need it

    name = f"{repo}@{revision}" if revision else repo
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(ALLOWED_DOWNLOADS)))
    except errors.GatedRepoError:
        raise CheckpointError("the hub wants its terms accepted first", name, "Accept them there, then: hf auth login") from None
    except errors.RevisionNotFoundError:
        raise CheckpointError("the hub knows no such revision", name) from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError("neither a directory nor a public model of the hub", name, "If it is private: hf auth login") from None
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, OSError) as error:
        raise CheckpointError(f"not in the hub's cache, and the hub cannot be reached ({type(error).__name__})", name,
                              "Connect once, or give a directory") from error  # fmt: skip

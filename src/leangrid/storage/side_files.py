"""Finds the files beside the weights that a result copies: tokenizer, templates, processors, modules, licence.

A result has everything that a loader of the checkpoint reads, as plain files, or the run is refused before it begins.
Code and pickles are neither read nor copied."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from leangrid.errors import CheckpointError
from leangrid.storage.foreign import PICKLES, is_pointer, pointer_error
from leangrid.storage.safetensors import parse_strict_json

MODULES = "modules.json"
MAX_PARTS = 6  # the most parts that the relative name of a side file may have

# Files that transformers, an engine or sentence-transformers reads: tokenizers of every class, templates, processors.
LOADED_FILES = (
    "tokenizer.json",
    "tokenizer.*.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*.json",
    "vocab*.txt",
    "vocab.bpe",
    "*_vocab.json",
    "encoder.json",
    "merges.txt",
    "bpe.codes",
    "dict.txt",
    "emoji.json",
    "byte_maps.json",
    "normalizer.json",
    "tekken.json",
    "*.model",
    "tokenizer.model.v*",
    "*.spm",
    "*.tiktoken",
    "prophetnet.tokenizer",
    "chat_template.jinja",
    "chat_template.json",
    "chat_templates/*.jinja",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
    MODULES,
    "sentence_*_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
)
LICENCES = tuple(
    f"{name}{end}" for name in ("LICENSE", "LICENCE", "COPYING", "NOTICE", "USE_POLICY") for end in ("", ".txt", ".md")
)
_MODULE_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")  # in a module's directory; what a download fetches
_CODE = (".py", ".pyc")
# sentence-transformers: modules that have weights, that have a config.json, and that never have weights.
_WEIGHTED = (
    "Dense",
    "LSTM",
    "CNN",
    "LayerNorm",
    "WeightedLayerPooling",
    "WordEmbeddings",
    "StaticEmbedding",
    "SparseAutoEncoder",
)
_CONFIGURED = (
    "Pooling",
    "WeightedLayerPooling",
    "Dense",
    "LayerNorm",
    "Dropout",
    "BoW",
    "WordWeights",
    "SpladePooling",
)
_WEIGHTLESS = ("Pooling", "Normalize", "Dropout", "BoW", "WordWeights")
_MOST_BYTES = 512 << 20  # largest side file; the weights of a module may be larger
_LFS_BYTES = 1024
_HASH = re.compile(r"[0-9a-f]{30,}")
_HUB = re.compile(r"(models|datasets|spaces)--")
_DOWNLOAD = "Finish the download, or copy the file into the checkpoint"


def find_side_files(directory: Path) -> tuple[dict[str, Path], list[str]]:
    """The files that a result copies besides config and weights (relative name -> real path), and sentences for the
    user.

    A link is followed if its target belongs to the checkpoint: it is inside, in a cache that names files by their hash,
    has the same name, or is a JSON object.

    Raises:
        CheckpointError: names a file that a loader reads and a result could not have: a link that is broken or leads
            elsewhere, a Git LFS pointer, a file that cannot be read, a module of modules.json that is missing or has
            pickled weights only.
    """
    found, notices = {}, []
    for name in _present(directory, LOADED_FILES):
        found[name] = _file(directory, name)
    for name in _present(directory, LICENCES):
        try:
            found[name] = _file(directory, name)
        except CheckpointError as error:
            notices.append(f"{error.what}: not copied")
    if "generation_config.json" in found:
        _refuse_no_object(found["generation_config.json"], directory / "generation_config.json")
    for module, kind in read_modules(directory).items():
        _add_module(directory, module, kind, found, notices)
    return dict(sorted(found.items())), notices


def _refuse_no_object(real: Path, path: Path) -> None:
    """Raise CheckpointError for JSON that is no object, on which transformers fails. It ignores what is no JSON."""
    try:
        value = parse_strict_json(real.read_bytes(), path)
    except CheckpointError:
        return
    if not isinstance(value, dict):
        raise CheckpointError(
            f"'{path.name}' is no JSON object", path, "Restore the checkpoint's own file, or remove it"
        )


def refuse_pointers(directory: Path) -> None:
    """Raise CheckpointError if a file that a loader reads is a Git LFS pointer."""
    for name in _present(directory, LOADED_FILES):
        path = directory / name
        if path.is_file():
            with path.open("rb") as file:
                if is_pointer(file.read(_LFS_BYTES)):
                    raise pointer_error(path)


def _present(directory: Path, patterns: Iterable[str]) -> list[str]:
    """The relative names in ``directory`` that match one of the patterns, in order; broken links are among them."""
    names: set[str] = set()
    for pattern in patterns:
        folder, _, last = pattern.rpartition("/")
        if (directory / folder).is_dir():
            found = (
                path.name
                for path in (directory / folder).iterdir()
                if fnmatchcase(path.name, last) and not path.name.startswith(".")
            )
            names |= {f"{folder}/{name}" if folder else name for name in found}
    return sorted(names)


def _file(directory: Path, name: str, most: int | None = None) -> Path:
    """The real path of the side file ``name``; CheckpointError with the reason if it cannot be copied.

    ``most`` is the largest size in bytes; None: ``_MOST_BYTES``."""
    path, limit = directory / name, _MOST_BYTES if most is None else most
    real = Path(os.path.realpath(path))
    if not real.exists():
        raise CheckpointError(f"'{name}' is a link to a file that is not there", path, _DOWNLOAD)
    if not real.is_file():
        raise CheckpointError(f"'{name}' is not a file", path, "Restore the checkpoint's own file, or remove it")
    if not _own(directory, path, real):
        raise CheckpointError(f"'{name}' is a link that leads out of the checkpoint, to {str(real)[:200]}", path,
                              "If that file belongs to the model, copy it here in the link's place")  # fmt: skip
    if real.stat().st_size > limit:
        raise CheckpointError(
            f"'{name}' has {real.stat().st_size} bytes; {limit} are allowed", path, "Restore the checkpoint's own file"
        )
    try:
        with real.open("rb") as file:
            start = file.read(_LFS_BYTES)
    except OSError as error:
        raise CheckpointError(
            f"'{name}' cannot be read: {error.strerror or error}", path, "Check the file's permissions"
        ) from error
    if is_pointer(start):
        raise pointer_error(path)
    return real


def _own(directory: Path, path: Path, real: Path) -> bool:
    """Whether the target of a link belongs to the checkpoint, rather than being somebody else's file."""
    folder = path.parent.resolve()
    if not folder.is_relative_to(directory.resolve()) and folder.name != path.parent.name:
        return False  # the directory itself is a link
    if real.is_relative_to(directory.resolve()) or (real.name == path.name and path.name != "config.json"):
        return True
    if _HASH.search(real.name) or (real.parent.name == "blobs" and _HUB.match(real.parent.parent.name)):
        return True  # a cache that names its files by their contents, the hub's among them
    if path.suffix != ".json" or any(part.startswith(".") for part in real.parts) or real.stat().st_size > _MOST_BYTES:
        return False  # credentials are JSON too, in hidden folders
    try:
        return isinstance(parse_strict_json(real.read_bytes(), real), dict)
    except (OSError, CheckpointError):
        return False


# sentence-transformers
# ----------------------------------------------------------------------------------------------------------------


def read_modules(directory: Path) -> dict[str, str]:
    """The modules of modules.json that have a directory of their own, in order: directory -> type.

    Empty if there is no such file. Raises CheckpointError if it is no list of modules, or names a directory outside of
    the checkpoint."""
    path = directory / MODULES
    if not path.is_file():
        return {}
    try:
        listed = parse_strict_json(path.read_bytes(), path)
    except OSError as error:
        raise CheckpointError(
            f"'{MODULES}' cannot be read: {error.strerror or error}", path, "Check the file's permissions"
        ) from error
    way_out = "Restore the model's own modules.json, or remove it"
    if not isinstance(listed, list) or not all(
        isinstance(entry, Mapping) and isinstance(entry.get("path"), str) for entry in listed
    ):
        raise CheckpointError(f"'{MODULES}' is no list of modules with a path each", path, way_out)
    found: dict[str, str] = {}
    for entry in listed:
        folder = PurePosixPath(entry["path"])
        sound = all(part.isprintable() and not part.startswith(".") and "\\" not in part for part in folder.parts)
        if folder.is_absolute() or not sound or len(folder.parts) >= MAX_PARTS:
            raise CheckpointError(
                f"'{MODULES}' sends a module to '{str(folder)[:100]}', no folder of the checkpoint", path, way_out
            )
        if folder.parts:
            found[folder.as_posix()] = str(entry.get("type", ""))
    return found


def list_missing_modules(directory: Path, names: Iterable[str]) -> list[str]:
    """One sentence for each module directory of a finished result's modules.json that has none of the files ``names``.

    Raises nothing: a damaged modules.json is a sentence too."""
    try:
        named = read_modules(directory)
    except CheckpointError as error:
        return [f"{MODULES}: {error.what}"]
    held = list(names)
    lost = (
        folder
        for folder, kind in named.items()
        if _kind(kind) != "Normalize" and not any(n.startswith(f"{folder}/") for n in held)
    )
    return [f"{folder}: named in {MODULES}, but not there" for folder in lost]


def list_module_patterns(directory: Path) -> list[str]:
    """Patterns of the files to download for the modules that a downloaded modules.json names."""
    return [f"{folder}/{pattern}" for folder in read_modules(directory) for pattern in _MODULE_FILES]


def _kind(name: str) -> str:
    """The class of a module's type: ``Pooling`` of ``sentence_transformers.models.Pooling``."""
    return name.rpartition(".")[2]


def _add_module(directory: Path, module: str, kind: str, found: dict[str, Path], notices: list[str]) -> None:
    """Add the files of one module to ``found``, and sentences about those that are not copied to ``notices``."""
    folder = directory / module
    if not folder.is_dir():
        if _kind(kind) == "Normalize":
            return
        what = f"the module '{module}', which {MODULES} names, is not there"
        raise CheckpointError(what, folder, f"Finish the download, or mend {MODULES}")
    if (folder / "config.json").is_file() and _kind(kind) == "Transformer":
        raise CheckpointError(
            f"{MODULES} keeps the transformer itself in '{module}'", folder, f"Give that directory: {folder}"
        )
    if (
        _kind(kind) in _CONFIGURED
        and kind.startswith("sentence_transformers.")
        and not (folder / "config.json").is_file()
    ):
        raise CheckpointError(f"the module '{module}' has no config.json", folder, _DOWNLOAD)
    names = list(_below(folder, module))
    _refuse_pickled(directory, module, kind, names)
    skipped = [name for name in names if PurePosixPath(name).suffix in (*_CODE, *PICKLES)]
    if skipped:
        notices.append(
            f"code and pickles of the module '{module}' are neither read nor copied: {', '.join(skipped[:3])}"
        )
    if kind and not kind.startswith("sentence_transformers."):
        notices.append(
            f"the module '{module}' is of the type {kind[:100]}, which is not of sentence-transformers: "
            "its code is not copied"
        )
    for name in names:
        if name not in skipped:
            found[name] = _file(directory, name, 1 << 40 if name.endswith(".safetensors") else None)


def _below(folder: Path, name: str) -> Iterator[str]:
    """Yield the relative names of all files in a module's directory and below, without hidden ones."""
    for path in sorted(folder.iterdir()):
        below = f"{name}/{path.name}"
        if path.name.startswith(".") or path.name == "__pycache__":
            continue
        if len(PurePosixPath(below).parts) > MAX_PARTS or not path.name.isprintable() or "\\" in path.name:
            raise CheckpointError(
                f"a result cannot hold a file called {below[:200]!r}", folder, "Rename it, or remove it"
            )
        if path.is_symlink() and path.is_dir():
            raise CheckpointError(f"'{below}' is a link to a folder", path, "Copy the folder in the link's place")
        if path.is_dir():
            yield from _below(path, below)
        else:
            yield below


def _refuse_pickled(directory: Path, module: str, kind: str, names: list[str]) -> None:
    """Raise CheckpointError if a module has pickled weights only, which are never read, or lacks the weights it has."""
    folders = {str(PurePosixPath(name).parent) for name in names} | {module}
    for folder in sorted(folders):
        here = [PurePosixPath(name) for name in names if str(PurePosixPath(name).parent) == folder]
        pickles = [path.name for path in here if path.suffix in PICKLES]
        stored = any(path.suffix == ".safetensors" for path in here)
        wanted = folder == module and _kind(kind) in _WEIGHTED
        if not stored and (wanted or (pickles and _kind(kind) not in _WEIGHTLESS)):
            what = (
                f"has pickled weights only ({pickles[0]}), which leangrid never loads" if pickles else "has no weights"
            )
            raise CheckpointError(
                f"the module '{folder}' {what}",
                directory / folder,
                "Save the model again with sentence-transformers, as safetensors: model.save(DIR)",
            )


def remove_auto_map(value: Any) -> Any:
    """A copy of a JSON value without any ``auto_map``, at any depth.

    The Python code that it names is not copied, so no user should be asked to trust it."""
    if isinstance(value, Mapping):
        return {key: remove_auto_map(item) for key, item in value.items() if key != "auto_map"}
    return [remove_auto_map(item) for item in value] if isinstance(value, list) else value

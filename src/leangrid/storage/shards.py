"""Which safetensors files make up a checkpoint, and which tensors are in them.

As transformers chooses them: ``model.safetensors`` if it exists, else the files that ``model.safetensors.index.json``
lists, else the files named NAME-00001-of-00003.safetensors, else the only ``*.safetensors`` file."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from leangrid.errors import CheckpointError
from leangrid.storage.foreign import ADAPTER_WEIGHTS, LFS_MARK, PICKLES, is_pointer, pointer_error
from leangrid.storage.remote import Remote
from leangrid.storage.safetensors import Header, TensorInfo, parse_strict_json

INDEX = "model.safetensors.index.json"
_MAX_INDEX = 100 << 20  # bytes
_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._ +=@-]{0,250}\.safetensors")
_NUMBERED = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<of>\d{5})\.safetensors")
_MAX_SHARDS = 10_000


def find_shards(directory: Path, notices: list[str], remote: Remote | None) -> tuple[list[str], dict[str, str] | None]:
    """The names of the files that make up the checkpoint and, if an index lists them, tensor name -> file name.

    Sentences for the user about files that are ignored are added to ``notices``. Raises CheckpointError if a file is
    missing, if nothing tells which files belong together, or if there are no safetensors weights."""
    on_hub = remote.sizes if remote is not None else {}
    names = {*on_hub, *(p.name for p in directory.iterdir() if p.name.endswith(".safetensors"))}
    # A name with a slash is a file of a sentence-transformers module.
    present = sorted(name for name in names if not ADAPTER_WEIGHTS.fullmatch(name) and "/" not in name)
    listed = None
    if "model.safetensors" in present:
        shards = ["model.safetensors"]
        if (directory / INDEX).exists():
            notices.append(f"both model.safetensors and {INDEX} exist: the single file is read, as transformers does")
    elif (directory / INDEX).exists():
        listed = _index(directory / INDEX)
        shards = sorted(set(listed.values()))
        missing = [name for name in shards if name not in on_hub and not (directory / name).is_file()]
        if missing:
            raise CheckpointError(
                f"{INDEX} names shards that are missing: {', '.join(missing[:5])} ({len(missing)} of {len(shards)})",
                directory,
                "Finish the download",
            )
    elif numbered := _numbered(present, directory):
        shards = numbered
    elif len(present) == 1:
        shards = present
    elif present:
        raise CheckpointError(f"{len(present)} safetensors files but neither model.safetensors nor {INDEX}", directory,
                              f"Add {INDEX}: without it nobody can know which belong together")  # fmt: skip
    else:
        raise _no_weights(directory)
    unlisted = [name for name in present if name not in shards]
    if unlisted:
        notices.append(
            f"not part of the checkpoint and ignored: {', '.join(unlisted[:5])}{' ...' if len(unlisted) > 5 else ''}"
        )
    return shards, listed


def collect_tensors(
    directory: Path, headers: Mapping[str, Header], listed: dict[str, str] | None, notices: list[str]
) -> dict[str, TensorInfo]:
    """Tensor name -> TensorInfo of all shards, in the order of the index if there is one.

    ``listed`` is the index (tensor name -> file name), None without one. Raises CheckpointError if a tensor is in two
    shards or not where the index says; tensors that the index does not list are ignored with a notice."""
    owner: dict[str, str] = {}
    for shard, header in headers.items():
        for name in header.tensors:
            if name in owner:
                raise CheckpointError(
                    f"tensor '{name}' is in two shards: {owner[name]} and {shard}", directory, "Download it again"
                )
            owner[name] = shard
    if listed is None:
        names = list(owner)
    else:
        absent = [name for name, shard in listed.items() if owner.get(name) != shard]
        if absent:
            raise CheckpointError(
                f"{INDEX} lists tensors that their shards do not hold: {', '.join(absent[:5])} ({len(absent)} in all)",
                directory,
                "Finish the download",
            )
        extra = [name for name in owner if name not in listed]
        if extra:
            notices.append(
                f"tensors that {INDEX} does not list are ignored: {', '.join(extra[:5])} ({len(extra)} in all)"
            )
        names = list(listed)
    if not names:
        raise CheckpointError("the checkpoint holds no tensors", directory)
    return {name: headers[owner[name]].tensors[name] for name in names}


def _numbered(present: Sequence[str], directory: Path) -> list[str]:
    """The complete set of shards named NAME-00001-of-00003.safetensors, which belong together also without an index.

    Empty if no file has such a name, or files of several sets have. Raises CheckpointError if the set has gaps."""
    parsed = [match for name in present if (match := _NUMBERED.fullmatch(name))]
    if len({(match["stem"], match["of"]) for match in parsed}) != 1:
        return []
    stem, of = parsed[0]["stem"], parsed[0]["of"]
    wanted = [f"{stem}-{number:0{len(of)}d}-of-{of}.safetensors" for number in range(1, min(int(of), _MAX_SHARDS) + 1)]
    missing = [name for name in wanted if name not in present]
    if missing:
        raise CheckpointError(
            f"shards are missing: {', '.join(missing[:5])} ({len(missing)} of {of})", directory, "Finish the download"
        )
    return wanted


def _index(path: Path) -> dict[str, str]:
    """The ``weight_map`` of an index: tensor name -> file name. Only plain names that end in .safetensors pass."""
    if path.stat().st_size > _MAX_INDEX:
        raise CheckpointError(f"the index has {path.stat().st_size} bytes; {_MAX_INDEX} are allowed", path)
    index = parse_strict_json(path.read_bytes(), path)
    weights = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weights, dict) or not weights:
        raise CheckpointError("the index has no weight_map", path, "Download it again")
    for tensor, name in weights.items():
        if not isinstance(name, str) or not _SHARD_NAME.fullmatch(name) or ".." in name:
            raise CheckpointError(
                f"the index sends tensor {tensor[:100]!r} to {str(name)[:100]!r}, not a plain *.safetensors name",
                path,
                "The index is damaged or hostile: do not use this checkpoint",
            )
    return weights


def _no_weights(directory: Path) -> CheckpointError:
    """The error for a directory without safetensors files: pickled weights, Git LFS pointers, or no weights at all."""
    pickles = sorted(p.name for p in directory.iterdir() if p.suffix in PICKLES)
    for path in (directory / name for name in pickles):
        with path.open("rb") as file:
            if is_pointer(file.read(len(LFS_MARK))):
                return pointer_error(path)
    if not pickles:
        return CheckpointError(
            "there are no safetensors weights", directory, "Give the directory of a Hugging Face checkpoint"
        )
    convert = (
        "from transformers import AutoModelForCausalLM as M; "
        f"M.from_pretrained({str(directory)!r}).save_pretrained({str(directory) + '-safetensors'!r})"
    )
    return CheckpointError(
        f"the weights are pickled ({', '.join(pickles[:3])}): loading them could run any program, so leangrid does not",
        directory,
        f'If you trust where they come from, convert them: python -c "{convert}"',
    )

"""A checkpoint directory that strangers made: everything is checked at the door, nothing in it is executed or
unpickled.

What counts as the checkpoint is what transformers would load: ``model.safetensors`` if there is one, else the shards
that ``model.safetensors.index.json`` lists, else the only ``*.safetensors`` file."""

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from leangrid.errors import CheckpointError, Interrupted
from leangrid.storage.config import check_layers, custom_code, read_config
from leangrid.storage.files import CHUNK
from leangrid.storage.foreign import (
    ADAPTER_WEIGHTS,
    LFS_MARK,
    adapter_notice,
    is_pointer,
    pointer,
    refuse_adapter,
    refuse_quantized,
)
from leangrid.storage.fused import unfused
from leangrid.storage.remote import Remote, here
from leangrid.storage.safetensors import (
    Header,
    Readable,
    TensorInfo,
    checked_header,
    open_header,
    read_tensor,
    strict_json,
)
from leangrid.storage.side_files import LOADED, TERMS, side_files

_INDEX = "model.safetensors.index.json"
_MAX_INDEX = 100 << 20
_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._ +=@-]{0,250}\.safetensors")
_NUMBERED = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<of>\d{5})\.safetensors")
_MOST_SHARDS = 10_000
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_SAMPLES, _SAMPLE_BYTES = 16, 4096  # of each shard's data, for the fingerprint

ALLOWED_DOWNLOADS = ("config.json", "*.safetensors", _INDEX, *LOADED, *TERMS)


class Checkpoint:
    """An opened, checked source.

    Attributes:
        directory: where it lies. config: its config.json. tensors: name -> TensorInfo, every tensor that belongs to it.
        identity: {"config": sha256, "files": {name: {"bytes", "header", "sample"}}}, equal for equal checkpoints;
            ``sample`` is the sha256 of 16 pieces of 4 KiB spread over the file, so that another fine-tune of the same
            shape is another checkpoint.
        fingerprint: sha256 of ``identity``. custom_code: what ``auto_map`` asks for (never run). notices: sentences for
        the user.
    """

    def __init__(self, directory: Path, config: dict[str, Any], headers: Mapping[str, Header], tensors: dict[str, TensorInfo],
                 notices: list[str], remote: Remote | None = None) -> None:  # fmt: skip
        self.directory, self.config, self.tensors, self.notices, self.remote = (
            directory,
            config,
            tensors,
            notices,
            remote,
        )
        self.custom_code = custom_code(config)
        if self.custom_code:
            self.notices.append(
                f"config.json asks for code of its own ({', '.join(self.custom_code)}): it is neither run nor copied"
            )
        self._stamps = {name: _stamp(directory / name) for name in headers if here(remote, directory / name)}
        self._header_bytes = {name: header.sha256 for name, header in headers.items()}
        self._open: tuple[str, Readable] | None = None
        self.identity: dict[str, Any] = {
            "config": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
            "files": {
                n: {"bytes": h.file_bytes, "header": h.sha256, "sample": _sample(directory / n, h, remote)}
                for n, h in headers.items()
            },
        }
        self.fingerprint = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the shard that is held open; the checkpoint stays usable."""
        if self._open is not None:
            self._open[1].close()
            self._open = None

    def read(self, name: str, check: bool = True) -> Tensor:
        """A copy of one tensor, in its own dtype and shape, on the CPU.

        Raises CheckpointError if there is no such tensor or, with ``check``, if it holds NaN or infinities (naming how
        many); Interrupted (exit code 3) if its file changed since the checkpoint was opened."""
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(f"the checkpoint has no tensor '{name}'", self.directory)
        try:
            tensor = read_tensor(self._file(info.file), info)
            self._check_unchanged(info.file)  # a file rewritten while it was read would give a mixture
        except EOFError as error:
            raise self._changed(info.file.name, str(error)) from error
        except OSError as error:
            raise CheckpointError(
                f"cannot read tensor '{name}': {error.strerror or error}", info.file, "Check the disk"
            ) from error
        if check and tensor.is_floating_point():
            check_finite(tensor, name, info.file)
        return tensor

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors hold the same values: by their bytes, a piece at a time, where dtype and shape are the
        same."""
        first, second = self.tensors[one], self.tensors[other]
        if (first.dtype, first.shape) != (second.dtype, second.shape):
            return first.shape == second.shape and torch.equal(self.read(one).double(), self.read(other).double())
        with closing(self._another(first.file)) as left, closing(self._another(second.file)) as right:
            left.seek(first.start)
            right.seek(second.start)
            for at in range(0, first.nbytes, CHUNK):
                size = min(CHUNK, first.nbytes - at)
                if _exactly(left, size) != _exactly(right, size):
                    return False
        return True

    def _another(self, path: Path) -> Readable:
        """The file opened once more: two places of one file are read in turn."""
        return self._remote_file(path) or path.open("rb", buffering=0)

    def expect(self, names: Iterable[str]) -> None:
        """Say that these tensors will be read next. The system may then read them into its page cache, which counts as
        nobody's memory; where it does not, they are read later."""
        for info in (self.tensors[name] for name in names):
            with suppress(OSError), info.file.open("rb", buffering=0) as file:
                os.posix_fadvise(file.fileno(), info.start, info.nbytes, os.POSIX_FADV_WILLNEED)

    def check_shapes(self, expected: Mapping[str, Sequence[int]], optional: Collection[str] = ()) -> None:
        """Compare with the tensors a model of this config has; CheckpointError lists every one that is missing, of
        another shape, or left over. ``optional`` names may be absent (tied weights) or present (buffers) as they
        like."""
        problems = [f"'{name}' is missing" for name in expected if name not in self.tensors and name not in optional]
        for name, info in self.tensors.items():
            if name in expected and info.shape != tuple(expected[name]):
                problems.append(f"'{name}' has shape {list(info.shape)}, config.json implies {list(expected[name])}")
            elif name not in expected and name not in optional:
                problems.append(f"'{name}' has no place in the model")
        if problems:
            shown = "; ".join(problems[:10]) + (f"; and {len(problems) - 10} more" if len(problems) > 10 else "")
            raise CheckpointError(
                f"config.json and the tensors disagree in {len(problems)} places: {shown}", self.directory
            )

    def side_files(self) -> dict[str, Path]:
        """Relative name -> real path of everything beside config and weights that belongs into a result
        (storage/side_files.py); CheckpointError naming the file where a result could not hold what a loader reads."""
        found, notices = side_files(self.directory)
        for notice in notices:
            self._note(notice)
        return found

    def _note(self, text: str) -> None:
        if text not in self.notices:
            self.notices.append(text)

    def _file(self, path: Path) -> Readable:
        """The shard, opened once and kept until another is asked for; its header is checked again at each opening."""
        remote = self._remote_file(path)
        if remote is not None:
            return remote
        if self._open is None or self._open[0] != path.name:
            self.close()
            self._check_unchanged(path)
            try:
                same = open_header(path).sha256 == self._header_bytes[path.name]
            except CheckpointError as error:
                raise self._changed(path.name, error.what) from error
            if not same:
                raise self._changed(path.name, "its header is another")
            self._open = (path.name, path.open("rb", buffering=0))
        else:
            self._check_unchanged(path)
        return self._open[1]

    def _remote_file(self, path: Path) -> Readable | None:
        """The file at the other end of the network, whose commit does not change; None for one that lies here."""
        return None if self.remote is None or here(self.remote, path) else self.remote.open(path.name)

    def _check_unchanged(self, path: Path) -> None:
        if not here(self.remote, path):
            return
        try:
            now = _stamp(path)
        except FileNotFoundError:
            raise self._changed(path.name, "it is gone") from None
        if now != self._stamps[path.name]:
            raise self._changed(path.name, f"{now[0]} bytes, {self._stamps[path.name][0]} at the start")

    def _changed(self, name: str, how: str) -> Interrupted:
        return Interrupted(
            f"'{name}' changed while it was being read: {how}",
            self.directory / name,
            "Finished blocks are kept. Restore the file and run the same command, or start over with --restart",
        )


def check_finite(tensor: Tensor, name: str, where: object) -> None:
    """CheckpointError naming the tensor and the counts if it holds NaN or infinities."""
    if tensor.dtype in (torch.float32, torch.bfloat16, torch.float16) and bool(
        tensor.sum(dtype=torch.float32).isfinite()
    ):
        return  # one cheap pass; only what is not finite, or overflows a sum, is looked at one by one
    finite = torch.isfinite(tensor)
    if not bool(finite.all()):
        nans = int(torch.isnan(tensor).sum())
        infinite = int(finite.numel() - finite.sum()) - nans
        raise CheckpointError(
            f"tensor '{name}' holds {nans} NaN and {infinite} infinite of {tensor.numel()} values",
            where,
            "The checkpoint is damaged or its training diverged: get another copy",
        )


def open_source(directory: Path, *, allow_quantized: bool = False, remote: Remote | None = None) -> Checkpoint:
    """Open a checkpoint directory, whose weights may be ``remote``, and check all of its headers.

    Reads headers and samples only, so it takes well under a second for a local one of any size. Raises CheckpointError
    for everything that is not a sound, unquantized safetensors checkpoint."""
    if not directory.is_dir():
        raise CheckpointError(
            "there is no such directory", directory, "Give a checkpoint directory, a hub id or a .gguf file"
        )
    config = read_config(directory / "config.json")
    if remote is None:
        refuse_adapter(directory)
    notices = adapter_notice(directory)
    shards, listed = _shards(directory, notices, remote)
    headers = {name: _header(directory / name, remote) for name in shards}
    tensors = _collect(directory, headers, listed, notices)
    if not allow_quantized:
        refuse_quantized(config, tensors, directory)
    apart = unfused(tensors, config.get("model_type") == "mixtral")
    if len(apart) > len(tensors):
        notices.append("the experts of a block are stored in one tensor: they are read one by one, and written so")
    check_layers(config, len(tensors), directory / "config.json")
    return Checkpoint(directory, config, headers, apart, notices, remote)


def _header(path: Path, remote: Remote | None) -> Header:
    if remote is None or here(remote, path):
        return open_header(path)
    return checked_header(path, remote.open(path.name), remote.sizes[path.name])


def _shards(directory: Path, notices: list[str], remote: Remote | None) -> tuple[list[str], dict[str, str] | None]:
    """The files that make up the checkpoint and, for an indexed one, tensor name -> file."""
    elsewhere = remote.sizes if remote is not None else {}
    there = {*elsewhere, *(p.name for p in directory.iterdir() if p.name.endswith(".safetensors"))}
    present = sorted(
        name for name in there if not ADAPTER_WEIGHTS.fullmatch(name) and "/" not in name
    )  # others lie in modules' folders
    listed = None
    if "model.safetensors" in present:
        shards = ["model.safetensors"]
        if (directory / _INDEX).exists():
            notices.append(f"both model.safetensors and {_INDEX} exist: the single file is read, as transformers does")
    elif (directory / _INDEX).exists():
        listed = _index(directory / _INDEX)
        shards = sorted(set(listed.values()))
        missing = [name for name in shards if name not in elsewhere and not (directory / name).is_file()]
        if missing:
            raise CheckpointError(
                f"{_INDEX} names shards that are missing: {', '.join(missing[:5])} ({len(missing)} of {len(shards)})",
                directory,
                "Finish the download",
            )
    elif numbered := _numbered(present, directory):
        shards = numbered
    elif len(present) == 1:
        shards = present
    elif present:
        raise CheckpointError(f"{len(present)} safetensors files but neither model.safetensors nor {_INDEX}", directory,
                              f"Add {_INDEX}: without it nobody can know which belong together")  # fmt: skip
    else:
        raise _no_weights(directory)
    unlisted = [name for name in present if name not in shards]
    if unlisted:
        notices.append(
            f"not part of the checkpoint and ignored: {', '.join(unlisted[:5])}{' ...' if len(unlisted) > 5 else ''}"
        )
    return shards, listed


def _numbered(present: Sequence[str], directory: Path) -> list[str]:
    """The shards called NAME-00001-of-00003.safetensors where all of them are there: without an index too they belong
    together. Empty where no file is called so, or files of several sets are; CheckpointError where some of the one set
    are missing."""
    parsed = [match for name in present if (match := _NUMBERED.fullmatch(name))]
    if len({(match["stem"], match["of"]) for match in parsed}) != 1:
        return []
    stem, of = parsed[0]["stem"], parsed[0]["of"]
    wanted = [f"{stem}-{number:0{len(of)}d}-of-{of}.safetensors" for number in range(1, min(int(of), _MOST_SHARDS) + 1)]
    missing = [name for name in wanted if name not in present]
    if missing:
        raise CheckpointError(
            f"shards are missing: {', '.join(missing[:5])} ({len(missing)} of {of})", directory, "Finish the download"
        )
    return wanted


def _no_weights(directory: Path) -> CheckpointError:
    pickles = sorted(p.name for p in directory.iterdir() if p.suffix in _PICKLES)
    for path in (directory / name for name in pickles):
        with path.open("rb") as file:
            if is_pointer(file.read(len(LFS_MARK))):
                return pointer(path)
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


def _index(path: Path) -> dict[str, str]:
    """The weight_map of an index: tensor name -> plain file name ending in .safetensors."""
    if path.stat().st_size > _MAX_INDEX:
        raise CheckpointError(f"the index has {path.stat().st_size} bytes; {_MAX_INDEX} are allowed", path)
    index = strict_json(path.read_bytes(), path)
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


def _collect(
    directory: Path, headers: Mapping[str, Header], listed: dict[str, str] | None, notices: list[str]
) -> dict[str, TensorInfo]:
    """Tensor name -> TensorInfo over all shards, held against the index."""
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
                f"{_INDEX} lists tensors that their shards do not hold: {', '.join(absent[:5])} ({len(absent)} in all)",
                directory,
                "Finish the download",
            )
        extra = [name for name in owner if name not in listed]
        if extra:
            notices.append(
                f"tensors that {_INDEX} does not list are ignored: {', '.join(extra[:5])} ({len(extra)} in all)"
            )
        names = list(listed)
    if not names:
        raise CheckpointError("the checkpoint holds no tensors", directory)
    return {name: headers[owner[name]].tensors[name] for name in names}


def _exactly(file: Readable, size: int) -> bytes:
    """The next ``size`` bytes, fewer at the file's end."""
    found = b""
    while len(found) < size and (piece := file.read(size - len(found))):
        found += piece
    return found


def _stamp(path: Path) -> tuple[int, int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns, status.st_ino


def _sample(path: Path, header: Header, remote: Remote | None) -> str:
    digest = hashlib.sha256()
    try:
        with closing(
            path.open("rb", buffering=0) if remote is None or here(remote, path) else remote.open(path.name)
        ) as file:
            for index in range(_SAMPLES):
                file.seek(index * max(header.file_bytes - _SAMPLE_BYTES, 0) // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES) or b"")
    except OSError as error:
        raise CheckpointError(f"cannot read: {error.strerror or error}", path, "Check the disk") from error
    return digest.hexdigest()

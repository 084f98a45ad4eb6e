"""Opens a checkpoint directory in the Hugging Face layout and reads its tensors.

The files are not trusted: headers, names, sizes and values are checked before they are used, and nothing is executed or
unpickled."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import closing, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from leangrid.errors import CheckpointError, Interrupted
from leangrid.storage.config import check_layer_count, find_custom_code, read_config
from leangrid.storage.files import CHUNK
from leangrid.storage.foreign import (
    list_adapter_notices,
    refuse_adapter,
    refuse_quantized,
)
from leangrid.storage.fused import split_fused_experts
from leangrid.storage.remote import Remote, is_local
from leangrid.storage.safetensors import (
    Header,
    Readable,
    TensorInfo,
    parse_header,
    read_header,
    read_tensor,
)
from leangrid.storage.shards import INDEX, collect_tensors, find_shards
from leangrid.storage.side_files import LICENCES, LOADED_FILES, find_side_files

_SAMPLES, _SAMPLE_BYTES = 16, 4096  # of each shard's data, for the fingerprint

ALLOWED_DOWNLOADS = ("config.json", "*.safetensors", INDEX, *LOADED_FILES, *LICENCES)


class Checkpoint:
    """An open checkpoint whose headers have been checked; a context manager that closes its file.

    Attributes:
        directory: the directory of the checkpoint.
        config: the content of its config.json.
        tensors: name -> TensorInfo of every tensor that belongs to it.
        notices: sentences for the user.
        remote: the hub model whose weights are read over the network; None if they are on this machine.
        custom_code: the names under which ``auto_map`` asks for Python code, which is never run.
        identity: {"config": sha256, "files": {name: {"bytes", "header", "sample"}}}, equal for equal checkpoints.
            ``sample`` is the sha256 of 16 pieces of 4 KiB spread over the file, so that two fine-tuned models of the
            same shapes differ.
        fingerprint: the sha256 of ``identity`` in hex.
    """

    def __init__(
        self,
        directory: Path,
        config: dict[str, Any],
        headers: Mapping[str, Header],
        tensors: dict[str, TensorInfo],
        notices: list[str],
        remote: Remote | None = None,
    ) -> None:
        self.directory, self.config, self.tensors = directory, config, tensors
        self.notices, self.remote = notices, remote
        self.custom_code = find_custom_code(config)
        if self.custom_code:
            self.notices.append(
                f"config.json asks for code of its own ({', '.join(self.custom_code)}): it is neither run nor copied"
            )
        self._stamps = {name: _stamp(directory / name) for name in headers if is_local(remote, directory / name)}
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
        """Close the shard that is open. The checkpoint stays usable: ``read`` opens it again."""
        if self._open is not None:
            self._open[1].close()
            self._open = None

    def read(self, name: str, check: bool = True) -> Tensor:
        """Read one tensor, in its own dtype and shape, into CPU memory.

        Raises:
            CheckpointError: there is no such tensor, it cannot be read or, with ``check``, it holds NaN or infinities.
            Interrupted: its file has changed since the checkpoint was opened (exit code 3).
        """
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

    def tensors_equal(self, one: str, other: str) -> bool:
        """Whether two tensors have the same shape and values. With the same dtype their bytes are compared, a piece
        at a time."""
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
        """A second handle for the same file, because two places of one file are read in turn."""
        return self._remote_file(path) or path.open("rb", buffering=0)

    def prefetch(self, names: Iterable[str]) -> None:
        """Tell the system that these tensors will be read next (``posix_fadvise``).

        It may then read them into its page cache, which is not memory of the process. Failures are ignored."""
        for info in (self.tensors[name] for name in names):
            with suppress(OSError), info.file.open("rb", buffering=0) as file:
                os.posix_fadvise(file.fileno(), info.start, info.nbytes, os.POSIX_FADV_WILLNEED)

    def side_files(self) -> dict[str, Path]:
        """Relative name -> real path of the files besides config and weights that a result copies.

        As ``side_files.find_side_files``, whose errors it raises; its sentences for the user go to ``notices``."""
        found, notices = find_side_files(self.directory)
        for notice in notices:
            self._note(notice)
        return found

    def _note(self, text: str) -> None:
        if text not in self.notices:
            self.notices.append(text)

    def _file(self, path: Path) -> Readable:
        """The open shard ``path``. It stays open until another is requested; its header is checked at each opening."""
        remote = self._remote_file(path)
        if remote is not None:
            return remote
        if self._open is None or self._open[0] != path.name:
            self.close()
            self._check_unchanged(path)
            try:
                same = read_header(path).sha256 == self._header_bytes[path.name]
            except CheckpointError as error:
                raise self._changed(path.name, error.what) from error
            if not same:
                raise self._changed(path.name, "its header is another")
            self._open = (path.name, path.open("rb", buffering=0))
        else:
            self._check_unchanged(path)
        return self._open[1]

    def _remote_file(self, path: Path) -> Readable | None:
        """The file on the hub, at a commit that cannot change; None for a file on this machine."""
        return None if self.remote is None or is_local(self.remote, path) else self.remote.open_file(path.name)

    def _check_unchanged(self, path: Path) -> None:
        """Raise Interrupted if a local file's size, time or inode is not what it was when the checkpoint was opened."""
        if not is_local(self.remote, path):
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
    """Raise CheckpointError, naming the tensor and how many, if ``tensor`` holds NaN or infinities.

    ``where`` is the file or directory that the message names."""
    if tensor.dtype in (torch.float32, torch.bfloat16, torch.float16) and bool(
        tensor.sum(dtype=torch.float32).isfinite()
    ):
        return  # one fast pass: a finite sum has finite terms, so only other tensors need the exact count below
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
    """Open a checkpoint directory and check config.json and the headers of all weights.

    Only headers and samples are read, so this takes well under a second for local files of any size.

    Args:
        allow_quantized: accept a checkpoint that is quantized already, such as a result of leangrid.
        remote: the hub model that has the weights; None if they are in ``directory``.

    Raises:
        CheckpointError: this is not a complete, undamaged safetensors checkpoint with unquantized weights.
    """
    if not directory.is_dir():
        raise CheckpointError(
            "there is no such directory", directory, "Give a checkpoint directory, a hub id or a .gguf file"
        )
    config = read_config(directory / "config.json")
    if remote is None:
        refuse_adapter(directory)
    notices = list_adapter_notices(directory)
    shards, listed = find_shards(directory, notices, remote)
    headers = {name: _header(directory / name, remote) for name in shards}
    tensors = collect_tensors(directory, headers, listed, notices)
    if not allow_quantized:
        refuse_quantized(config, tensors, directory)
    separate = split_fused_experts(tensors, config.get("model_type") == "mixtral")
    if len(separate) > len(tensors):
        notices.append("the experts of a block are stored in one tensor: they are read one by one, and written so")
    check_layer_count(config, len(tensors), directory / "config.json")
    return Checkpoint(directory, config, headers, separate, notices, remote)


def _header(path: Path, remote: Remote | None) -> Header:
    if remote is None or is_local(remote, path):
        return read_header(path)
    return parse_header(path, remote.open_file(path.name), remote.sizes[path.name])


def _exactly(file: Readable, size: int) -> bytes:
    """The next ``size`` bytes of a file; fewer only at its end."""
    found = b""
    while len(found) < size and (piece := file.read(size - len(found))):
        found += piece
    return found


def _stamp(path: Path) -> tuple[int, int, int]:
    """Size in bytes, time of the last change in nanoseconds, and inode of a file."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns, status.st_ino


def _sample(path: Path, header: Header, remote: Remote | None) -> str:
    """The sha256, in hex, of 16 pieces of 4 KiB at equal distances over a file."""
    digest = hashlib.sha256()
    try:
        with closing(
            path.open("rb", buffering=0) if remote is None or is_local(remote, path) else remote.open_file(path.name)
        ) as file:
            for index in range(_SAMPLES):
                file.seek(index * max(header.file_bytes - _SAMPLE_BYTES, 0) // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES) or b"")
    except OSError as error:
        raise CheckpointError(f"cannot read: {error.strerror or error}", path, "Check the disk") from error
    return digest.hexdigest()

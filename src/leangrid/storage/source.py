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
from leangrid.storage.dequantize import DequantizedInfo, as_scale, dequantize
from leangrid.storage.files import CHUNK
from leangrid.storage.foreign import list_adapter_notices, refuse_adapter
from leangrid.storage.quantized_layouts import DAMAGED
from leangrid.storage.quantized_source import MODELOPT, StoredAs, open_quantized, without_quantization
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
_PIECE = 1 << 22  # values that are looked at together for NaN: a sum in float32 copies 16-bit values

ALLOWED_DOWNLOADS = ("config.json", MODELOPT, "*.safetensors", INDEX, *LOADED_FILES, *LICENCES)


class Checkpoint:
    """An open checkpoint whose headers have been checked; a context manager that closes its file.

    Attributes:
        directory: the directory of the checkpoint.
        config: the content of its config.json; without its quantization entry where the weights are dequantized.
        tensors: name -> TensorInfo of every tensor that belongs to it. One that is stored in fewer bits than 16 is a
            ``DequantizedInfo`` under the name and in the shape and dtype that it is dequantized to.
        stored_as: what the weights are stored in where that is fewer bits than 16; else None.
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
        stored_as: StoredAs | None = None,
    ) -> None:
        self.directory, self.config, self.tensors = directory, config, tensors
        self.notices, self.remote, self.stored_as = notices, remote, stored_as
        self.custom_code = find_custom_code(config)
        if self.custom_code:
            self.notices.append(
                f"config.json asks for code of its own ({', '.join(self.custom_code)}): it is neither run nor copied"
            )
        self._stamps = {name: _stamp(directory / name) for name in headers if is_local(remote, directory / name)}
        self._header_bytes = {name: header.sha256 for name, header in headers.items()}
        self._open: tuple[str, Readable] | None = None
        self.identity: dict[str, Any] = {
            "config": hashlib.sha256(json.dumps(self._whole_config(), sort_keys=True).encode()).hexdigest(),
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
        """Read one tensor, in the dtype and shape of its info, into CPU memory. Codes are dequantized.

        Raises:
            CheckpointError: there is no such tensor, it cannot be read or, with ``check``, it or its scales hold NaN or
                infinities.
            Interrupted: its file has changed since the checkpoint was opened (exit code 3).
        """
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(f"the checkpoint has no tensor '{name}'", self.directory)
        return self.read_info(info, name, check)

    def read_entry(self, name: str, index: int, check: bool = True) -> Tensor:
        """Read entry ``index`` of a tensor's first dimension alone, such as one expert of a block. Raises as ``read``
        does."""
        return self.read_info(self.tensors[name].entry(index), name, check)

    def read_info(self, info: TensorInfo, name: str, check: bool = True) -> Tensor:
        """Read what ``info`` says: a value of ``tensors``, of ``stored_parts``, or an ``entry`` or ``rows`` of one.

        ``name`` is for messages. Raises as ``read`` does."""
        if isinstance(info, DequantizedInfo):
            tensor = dequantize(info, lambda role: self._part(info, role, check))
        else:
            tensor = self._stored(info, name)
        if check and tensor.is_floating_point():
            check_finite(tensor, name, info.file)
        return tensor

    def stored_parts(self, name: str) -> dict[str, TensorInfo]:
        """The tensors in the files of which a tensor is made, by their names there: codes, scales and zero points, or
        itself alone where it is plain."""
        info = self.tensors[name]
        return {info.names[r]: p for r, p in info.parts.items()} if isinstance(info, DequantizedInfo) else {name: info}

    def _part(self, info: DequantizedInfo, role: str, check: bool) -> Tensor:
        """A part of a dequantized tensor as stored, after a look at its values."""
        part, name = info.parts[role], info.names[role]
        tensor = self._stored(part, name)
        if check and role == "scale":
            check_finite(as_scale(tensor, info.layout), name, part.file)
        elif check and tensor.dtype in (torch.float32, torch.bfloat16, torch.float16):
            check_finite(tensor, name, part.file)
        if role == "global_scale" and not bool(tensor.all()):
            raise CheckpointError(f"the scale '{name}' is zero, and others are divided by it", part.file, DAMAGED)
        return tensor

    def _stored(self, info: TensorInfo, name: str) -> Tensor:
        """The tensor that the bytes of ``info`` are."""
        try:
            tensor = read_tensor(self._file(info.file), info)
            self._check_unchanged(info.file)  # a file rewritten while it was read would give a mixture
        except EOFError as error:
            raise self._changed(info.file.name, str(error)) from error
        except OSError as error:
            raise CheckpointError(
                f"cannot read tensor '{name}': {error.strerror or error}", info.file, "Check the disk"
            ) from error
        return tensor

    def _whole_config(self) -> dict[str, Any]:
        """The config with its quantization entry, since codes mean what it says."""
        return self.config if self.stored_as is None else {**self.config, "quantization_config": self.stored_as.entry}

    def tensors_equal(self, one: str, other: str) -> bool:
        """Whether two tensors have the same shape and values. With the same dtype their bytes are compared, a piece
        at a time, unless they have to be dequantized."""
        first, second = self.tensors[one], self.tensors[other]
        if (first.dtype, first.shape) != (second.dtype, second.shape) or not (first.is_plain and second.is_plain):
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
        for info in (part for name in names for part in self.stored_parts(name).values()):
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
    if tensor.dtype in (torch.float32, torch.bfloat16, torch.float16) and all(
        bool(piece.sum(dtype=torch.float32).isfinite()) for piece in tensor.reshape(-1).split(_PIECE)
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
        CheckpointError: this is not a complete, undamaged safetensors checkpoint with weights that are plain or in a
            layout that is dequantized.
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
    stored_as = None
    if not allow_quantized:
        opened = open_quantized(config, tensors, directory, lambda info: _read_now(info, remote), notices)
        if opened is not None:
            (tensors, stored_as), config = opened, without_quantization(config)
    check_layer_count(config, len(tensors), directory / "config.json")
    return Checkpoint(directory, config, headers, tensors, notices, remote, stored_as)


def _header(path: Path, remote: Remote | None) -> Header:
    if remote is None or is_local(remote, path):
        return read_header(path)
    return parse_header(path, remote.open_file(path.name), remote.sizes[path.name])


def _read_now(info: TensorInfo, remote: Remote | None) -> Tensor:
    """One small tensor of a checkpoint that is being opened."""
    try:
        with closing(_opened(info.file, remote)) as file:
            return read_tensor(file, info)
    except (OSError, EOFError) as error:
        raise CheckpointError(f"cannot read: {error}", info.file, "Check the disk") from error


def _opened(path: Path, remote: Remote | None) -> Readable:
    return path.open("rb", buffering=0) if remote is None or is_local(remote, path) else remote.open_file(path.name)


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
        with closing(_opened(path, remote)) as file:
            for index in range(_SAMPLES):
                file.seek(index * max(header.file_bytes - _SAMPLE_BYTES, 0) // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES) or b"")
    except OSError as error:
        raise CheckpointError(f"cannot read: {error.strerror or error}", path, "Check the disk") from error
    return digest.hexdigest()

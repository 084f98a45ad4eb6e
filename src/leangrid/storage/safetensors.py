"""Reads and writes safetensors files.

Format (https://github.com/huggingface/safetensors, README "Format"): 8 bytes little-endian length N of the header; N
bytes of JSON ``{name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {str: str}}`` padded with
spaces; the tensors, row-major, without holes or overlaps, to the end of the file.

The whole header is checked before any data are read. Data are copied into memory, never mapped: a file that becomes
shorter meanwhile gives an error, not a SIGBUS."""

import hashlib
import json
import math
import os
import stat
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from leangrid.errors import CheckpointError, FormatError
from leangrid.storage.dtypes import DTYPES, NAMES
from leangrid.storage.files import CHUNK, atomic_write, read_chunks
from leangrid.storage.foreign import LFS_MARK, is_pointer, pointer_error

_MAX_HEADER = 100_000_000  # bytes; the limit of the reference implementation
_MAX_ENTRIES = 4_000_000  # commas and brackets, as of about 500,000 tensors; bounds the memory of the JSON parser
_FIELDS = {"dtype", "shape", "data_offsets"}
_WAY_OUT = "Download the file again, or convert the checkpoint with the library that wrote it"


@runtime_checkable
class Readable(Protocol):
    """An open, unbuffered file, on this machine or on the hub; a call may return less than was requested."""

    def seek(self, offset: int, /) -> int: ...
    def read(self, size: int, /) -> bytes | None: ...
    def readinto(self, buffer: Any, /) -> int | None: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor is stored: the bytes ``start`` to ``end`` (exclusive) of ``file``.

    ``dtype`` is its name in safetensors, such as BF16."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.end - self.start

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch's."""
        return DTYPES[self.dtype]

    @property
    def is_plain(self) -> bool:
        """Whether the bytes in the file are the tensor's own, so that they can be copied."""
        return True

    def entry(self, index: int) -> "TensorInfo":
        """Entry ``index`` of the first dimension."""
        return replace(self.rows(index, index + 1), shape=self.shape[1:])

    def rows(self, start: int, stop: int) -> "TensorInfo":
        """The entries ``start`` to ``stop`` (exclusive) of the first dimension."""
        size = self.nbytes // self.shape[0]
        at = (self.start + start * size, self.start + stop * size)
        return replace(self, shape=(stop - start, *self.shape[1:]), start=at[0], end=at[1])


@dataclass(frozen=True)
class Header:
    """A checked header.

    Attributes:
        tensors: where each tensor is, in the order of the file.
        metadata: the free text of ``__metadata__``.
        sha256: of the header's JSON, in hex.
        file_bytes: size of the file.
    """

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    sha256: str
    file_bytes: int


def read_tensor_infos(path: Path) -> dict[str, TensorInfo]:
    """Where each tensor of the file ``path`` is, in the order of the file; ``read_header`` without the rest."""
    return read_header(path).tensors


def read_header(path: Path) -> Header:
    """Read and check the header of the file ``path``; at most 100 MB of JSON with 4 million entries.

    Raises CheckpointError, naming the file, if it cannot be read or breaks the format in any way."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a FIFO would block for ever, a device would never end
            raise _broken(path, "is not a regular file")
        with path.open("rb", buffering=0) as file:
            return parse_header(path, file, os.fstat(file.fileno()).st_size)
    except FileNotFoundError:
        what = "the file is a link to one that is not there" if path.is_symlink() else "the file does not exist"
        raise CheckpointError(what, path, _WAY_OUT) from None
    except OSError as error:
        raise CheckpointError(
            f"cannot read: {error.strerror or error}", path, "Check the file's permissions and the disk"
        ) from error


def parse_header(path: Path, file: Readable, size: int) -> Header:
    """Read and check the header of an open file of ``size`` bytes, from its start.

    ``path`` is the name for messages and for the TensorInfos. Errors are those of ``read_header``."""
    prefix = file.read(8) or b""
    if len(prefix) < 8:
        raise _broken(path, f"is truncated: {size} bytes, a header needs at least 8")
    if prefix == LFS_MARK[:8]:
        raise pointer_error(path)
    (length,) = struct.unpack("<Q", prefix)
    if length > _MAX_HEADER:
        raise _broken(path, f"announces a header of {length} bytes; the format allows {_MAX_HEADER}")
    if length > size - 8:
        raise _broken(path, f"is truncated: it announces a header of {length} bytes, {size - 8} follow")
    raw = bytearray(length)
    view, filled = memoryview(raw), 0
    while filled < length:
        count = file.readinto(view[filled:])
        if not count:
            raise _broken(path, f"is truncated: it announces a header of {length} bytes, {filled} could be read")
        filled += count
    if sum(raw.count(mark) for mark in (b"{", b"[", b",")) > _MAX_ENTRIES:
        raise _broken(path, f"has a header of more than {_MAX_ENTRIES} entries")
    entries = parse_strict_json(raw, path)
    if not isinstance(entries, dict):
        raise _broken(path, "has a header that is not a JSON object")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _broken(path, "has a __metadata__ that is not text to text")
    base = 8 + length
    tensors = [(name, _entry(path, name, entry, base)) for name, entry in entries.items()]
    tensors.sort(key=lambda item: (item[1].start, item[1].end))
    at = base
    for name, info in tensors:
        if info.start != at:
            kind = "a hole before" if info.start > at else "an overlap at"
            raise _broken(
                path, f"has {kind} tensor '{name}': it starts at byte {info.start}, the one before ends at {at}"
            )
        at = info.end
    if at != size:
        problem = "is truncated" if at > size else "has trailing bytes"
        raise _broken(path, f"{problem}: its header describes {at} bytes, the file has {size}")
    return Header(dict(tensors), metadata, hashlib.sha256(raw).hexdigest(), size)


def _entry(path: Path, name: str, entry: Any, base: int) -> TensorInfo:
    """Check one entry of the header; ``base`` is the offset in the file from which its offsets count."""
    if not name.isprintable():  # also refuses lone surrogates, which no file could be written with
        raise _broken(path, f"has a tensor with an unprintable name: {name[:200]!r}")
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        raise _broken(path, f"describes tensor '{name[:200]}' by something else than dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _broken(path, f"holds tensor '{name}' in the dtype {str(dtype)[:40]!r}, which leangrid does not know")
    if not (_naturals(shape) and _naturals(offsets) and len(offsets) == 2 and offsets[0] <= offsets[1]):
        raise _broken(path, f"describes tensor '{name}' with shape {str(shape)[:80]} and offsets {str(offsets)[:80]}")
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    if expected != offsets[1] - offsets[0]:
        raise _broken(
            path, f"gives tensor '{name}' ({dtype} {shape}) {offsets[1] - offsets[0]} bytes; its shape needs {expected}"
        )
    return TensorInfo(path, dtype, tuple(shape), base + offsets[0], base + offsets[1])


def _naturals(value: Any) -> bool:
    if type(value) is not list or len(value) > 64:
        return False
    return not value or ({*map(type, value)} == {int} and min(value) >= 0 and max(value) < 1 << 63)


def parse_strict_json(raw: bytes | bytearray, path: Path, *, allow_infinity: bool = False) -> Any:
    """Parse JSON; CheckpointError for what parsers disagree on: duplicate keys, NaN, deep nesting, invalid UTF-8.

    ``path`` is for messages; ``allow_infinity`` accepts Infinity and -Infinity, which some config.json have."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(items)
        if len(result) != len(items):
            seen: set[str] = set()
            twice = next(key for key, _ in items if key in seen or seen.add(key))
            raise _broken(path, f"names {twice[:200]!r} twice")
        return result

    def constant(text: str) -> float:
        if allow_infinity and text != "NaN":
            return float(text)
        raise _broken(path, f"contains {text}, which is not JSON")

    if is_pointer(raw):
        raise pointer_error(path)
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=pairs, parse_constant=constant)
    except RecursionError:
        raise _broken(path, "is nested too deeply") from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, an integer of thousands of digits
        raise _broken(path, f"does not hold valid JSON: {str(error)[:200]}") from None


def _broken(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(f"'{path.name}' {problem}", path, _WAY_OUT)


def read_tensor(file: Readable, info: TensorInfo) -> Tensor:
    """Copy one tensor from an open file into CPU memory, in its own dtype. EOFError if the file ends too early."""
    tensor = torch.empty(info.shape, dtype=info.torch_dtype)
    _fill(file, info, tensor)
    return tensor


def _fill(file: Readable, info: TensorInfo, tensor: Tensor) -> memoryview:
    """Read the bytes of ``info`` into ``tensor`` and return them as flat memory."""
    file.seek(info.start)
    view, filled = memoryview_of(tensor), 0
    while filled < len(view):
        count = file.readinto(view[filled:])
        if not count:
            raise EOFError(f"'{info.file.name}' ends {len(view) - filled} bytes early")
        filled += count
    return view


def memoryview_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor as flat memory, shared with it."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def load(path: Path, sha256: str | None = None, convert: Callable[[Tensor], Tensor] = lambda x: x) -> dict[str, Tensor]:
    """Read all tensors of a file in one pass, in the order of the file, into CPU memory.

    Args:
        sha256: the expected hash of the file's bytes in hex; None: it is not checked.
        convert: is applied to each tensor as soon as it is read; its result is returned in the tensor's place.

    Raises:
        CheckpointError: the file cannot be read, breaks the format, or has another hash.
    """
    header = read_header(path)
    digest, tensors = hashlib.sha256(), {}
    try:
        with path.open("rb", buffering=0) as file:
            if sha256 is not None:
                first = min((info.start for info in header.tensors.values()), default=header.file_bytes)
                digest.update(file.read(first))
            for name, info in header.tensors.items():
                tensor = torch.empty(info.shape, dtype=info.torch_dtype)
                view = _fill(file, info, tensor)
                if sha256 is not None:
                    for start in range(0, len(view), CHUNK):
                        digest.update(view[start : start + CHUNK])
                tensors[name] = convert(tensor)
    except (OSError, EOFError) as error:
        raise CheckpointError(f"cannot read: {error}", path, "Check the disk") from error
    if sha256 is not None and digest.hexdigest() != sha256:
        raise CheckpointError("the file's contents are not what was written (sha256 differs)", path)
    return tensors


Source = Tensor | TensorInfo


def save(path: Path, tensors: Mapping[str, Source], metadata: Mapping[str, str] | None = None) -> str:
    """Write ``tensors`` to the file ``path``, completely or not at all, and return its sha256 in hex.

    The bytes of a TensorInfo are copied from its file in chunks; a Tensor that is not contiguous or not on the CPU is
    copied there, one at a time. The order is by descending element size, then by name, so that each tensor is aligned
    to its elements and equal tensors give equal bytes. Raises FormatError for a dtype that safetensors does not have,
    and OutputError if the file cannot be written."""
    order = sorted(tensors, key=lambda name: (-_dtype_of(name, tensors[name]).itemsize, name))
    header = _header({name: tensors[name] for name in order}, metadata or {})
    total = len(header) + sum(_nbytes(tensors[name]) for name in order)
    return atomic_write(path, _stream(header, (tensors[name] for name in order)), size=total)


def _dtype_of(name: str, source: Source) -> torch.dtype:
    if isinstance(source, TensorInfo) and not source.is_plain:
        raise FormatError("a tensor that is stored in codes has no bytes to copy: read it first", f"tensor '{name}'")
    dtype = source.torch_dtype if isinstance(source, TensorInfo) else source.dtype
    if dtype not in NAMES:
        raise FormatError(f"safetensors cannot hold {dtype}", f"tensor '{name}'")
    return dtype


def _nbytes(source: Source) -> int:
    return source.nbytes if isinstance(source, TensorInfo) else source.numel() * source.dtype.itemsize


def _header(tensors: Mapping[str, Source], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, source in tensors.items():
        if name == "__metadata__":
            raise FormatError("no tensor may be called __metadata__ in safetensors")
        end = at + _nbytes(source)
        entries[name] = {
            "dtype": NAMES[_dtype_of(name, source)],
            "shape": list(source.shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _stream(header: bytes, sources: Iterable[Source]) -> Iterator[bytes | memoryview]:
    yield header
    for source in sources:
        if isinstance(source, TensorInfo):
            yield from read_chunks(source.file, source.start, source.nbytes)
        elif source.numel():
            yield memoryview_of(source.detach().cpu().contiguous())


def read_named(infos: Mapping[str, TensorInfo], names: Iterable[str]) -> dict[str, Tensor]:
    """Some tensors of files on this machine, in CPU memory. CheckpointError where one is missing or cannot be read."""
    found: dict[str, Tensor] = {}
    for name in names:
        info = infos.get(name)
        if info is None:
            raise CheckpointError("is missing", name, "Start over with --restart")
        try:
            with info.file.open("rb", buffering=0) as file:
                found[name] = read_tensor(file, info)
        except (OSError, EOFError) as error:
            raise CheckpointError(f"cannot read tensor '{name}': {error}", info.file, "Check the disk") from error
    return found

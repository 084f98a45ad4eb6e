"""Reads the header of a GGUF file (ggml, docs/gguf.md) without trusting it.

Every number is checked against the size of the file before anything is allocated according to it. gguf-py's reader maps
the file, makes two arrays for each token (seconds and hundreds of MB for a large vocabulary), and reads past the end of
the file if a count is absurd; so only its table of types and its dequantization are used."""

import math
import os
import stat
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from leangrid.errors import CheckpointError
from leangrid.storage.foreign import LFS_MARK, is_pointer, pointer_error
from leangrid.storage.gguf import SCALARS, Field

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)  # version 1 counted in 32 bits; nothing has written it since 2023
_MAX_FIELDS, _MAX_TENSORS, _MAX_DIMENSIONS, _MAX_KEY = 65_536, 1_000_000, 4, 65_535
_MAX_VALUES = 16_000_000  # in all arrays together; the largest vocabularies have about a million tokens and merges
_MAX_BYTES = 512 << 20  # size of the whole header
_STRING, _ARRAY = 8, 9
_KINDS = {number: (kind, struct.Struct(f"<{letter}")) for kind, (number, letter) in SCALARS.items()}
_WAY_OUT = "Download the file again; a file that was cut into pieces is joined first (cat, or llama-gguf-split --merge)"


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is stored: the bytes ``start`` to ``start + nbytes`` of ``file``.

    ``shape`` is in torch's order (rows, columns); ``kind`` is the name of ggml's type, such as Q4_K."""

    file: Path
    shape: tuple[int, ...]
    kind: str
    start: int
    nbytes: int

    @property
    def row_bytes(self) -> int:
        """Size in bytes of one row (the last dimension)."""
        return self.nbytes // max(self.rows, 1)

    @property
    def rows(self) -> int:
        """Number of rows: the product of all dimensions but the last."""
        return math.prod(self.shape[:-1])


@dataclass(frozen=True)
class Header:
    """A checked header: fields and tensors by name, in the order of the file."""

    file: Path
    fields: dict[str, Field]
    tensors: dict[str, StoredTensor]

    def value(self, key: str, default: Any = None) -> Any:
        """The value of the field ``key``; ``default`` if the file does not have it."""
        field = self.fields.get(key)
        return default if field is None else field.value


def begins_as_gguf(path: Path) -> bool:
    """Whether ``path`` is a GGUF file by its first bytes, whatever its name. CheckpointError for a Git LFS pointer."""
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            start = file.read(len(LFS_MARK))
    except OSError:
        return False  # the error appears when the file is read
    if is_pointer(start):
        raise pointer_error(path)
    return start.startswith(_MAGIC)


def read_header(path: Path) -> Header:
    """Read and check the header of the GGUF file ``path``; at most 512 MB of header and 16 million values.

    Raises:
        CheckpointError: there is no such file, it is no GGUF file or a Git LFS pointer, its version or byte order is
            not supported, or it breaks the format, also by ending too early.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a FIFO would block for ever
            raise CheckpointError("this is not a regular file", path, "Give the path of a .gguf file")
        with path.open("rb") as file:
            return _Reader(path, file, os.fstat(file.fileno()).st_size).header()
    except FileNotFoundError:
        raise CheckpointError("there is no such file", path, "Give the path of a .gguf file") from None
    except OSError as error:
        raise CheckpointError(
            f"the file cannot be read: {error.strerror}", path, "Check its permissions and the disk"
        ) from error


class _Reader:
    """Reads an open GGUF file of ``size`` bytes from its start; ``at`` is the offset of the next byte."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.file, self.size = path, file, size
        self.at, self.values = 0, 0

    def header(self) -> Header:
        self._check_start()
        tensors, count = self._unpack("<QQ")
        if count > _MAX_FIELDS or tensors > _MAX_TENSORS:
            raise self._broken(
                f"announces {count} fields and {tensors} tensors; {_MAX_FIELDS} and {_MAX_TENSORS} are read"
            )
        fields: dict[str, Field] = {}
        for _ in range(count):
            key = self._string(_MAX_KEY, "a key")
            if key in fields:
                raise self._broken(f"names the field {key!r} twice")
            fields[key] = self._field(key)
        places = self._places(tensors)
        return Header(self.path, fields, self._tensors(places, self._alignment(fields)))

    def _check_start(self) -> None:
        start = self.file.read(64)
        if is_pointer(start):
            raise pointer_error(self.path)
        if start[:4] != _MAGIC:
            raise CheckpointError(
                "this is no GGUF file: it does not begin with 'GGUF'", self.path, "Check the download"
            )
        self.file.seek(4)
        self.at = 4
        (version,) = self._unpack("<I")
        if version not in _VERSIONS and int.from_bytes(version.to_bytes(4, "little"), "big") in (1, *_VERSIONS):
            raise CheckpointError(
                "this GGUF file is big-endian", self.path, "Give the little-endian file, or convert it (gguf-py)"
            )
        if version not in _VERSIONS:
            raise CheckpointError(f"this is a GGUF file of version {version}; versions 2 and 3 are read", self.path,
                                  "Convert the model again with today's llama.cpp")  # fmt: skip

    def _field(self, key: str) -> Field:
        (number,) = self._unpack("<I")
        if number != _ARRAY:
            return Field(self._kind(number, key), self._value(number, key))
        inner, count = self._unpack("<IQ")
        kind = self._kind(inner, key)
        self.values += count
        if self.values > _MAX_VALUES:
            raise self._broken(f"announces {count} values in {key!r}; all arrays together may have {_MAX_VALUES}")
        if inner == _STRING:
            return Field(kind, self._strings(count, key))
        letter = _KINDS[inner][1].format[-1]
        if letter == "?":
            return Field(kind, [bool(byte) for byte in self._bytes(count, key)])
        return Field(kind, list(struct.unpack(f"<{count}{letter}", self._bytes(count * _KINDS[inner][1].size, key))))

    def _strings(self, count: int, key: str) -> list[str]:
        """Read ``count`` strings in one loop: a vocabulary has hundreds of thousands, too many for a call each."""
        read, at, end = self.file.read, self.at, min(self.size, _MAX_BYTES)
        found: list[str] = []
        try:
            for _ in range(count):
                length = int.from_bytes(read(8), "little")
                at += 8 + length
                if at > end:
                    raise self._broken(f"is truncated: {key!r} would end at byte {at}, and the file has {self.size}")
                found.append(read(length).decode())
        except UnicodeDecodeError:
            raise self._broken(f"has text that is not UTF-8 in {key!r}") from None
        self.at = at
        return found

    def _kind(self, number: int, key: str) -> str:
        if number == _STRING:
            return "string"
        if number not in _KINDS:
            what = "an array of arrays" if number == _ARRAY else f"a value of unknown type {number}"
            raise self._broken(f"holds {what} in {key!r}, which leangrid does not read")
        return _KINDS[number][0]

    def _value(self, number: int, key: str) -> Any:
        if number == _STRING:
            return self._string(_MAX_BYTES, key)
        return _KINDS[number][1].unpack(self._bytes(_KINDS[number][1].size, key))[0]

    def _places(self, count: int) -> dict[str, tuple[tuple[int, ...], int, int]]:
        """Name -> shape in torch's order, type number and offset of each tensor."""
        places: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(count):
            name = self._string(_MAX_KEY, "a tensor's name")
            (dimensions,) = self._unpack("<I")
            if name in places or not name.isprintable() or not 0 < dimensions <= _MAX_DIMENSIONS:
                what = "twice" if name in places else f"with {dimensions} dimensions"
                raise self._broken(f"describes the tensor {name[:80]!r} {what}")
            shape = self._unpack(f"<{dimensions}Q")
            places[name] = (tuple(reversed(shape)), *self._unpack("<IQ"))
        return places

    def _alignment(self, fields: dict[str, Field]) -> int:
        alignment = fields["general.alignment"].value if "general.alignment" in fields else 32
        if not isinstance(alignment, int) or not 8 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise self._broken(f"gives general.alignment as {str(alignment)[:40]}; it is a power of two")
        return alignment

    def _tensors(self, places: dict[str, tuple[tuple[int, ...], int, int]], alignment: int) -> dict[str, StoredTensor]:
        base = -(-self.at // alignment) * alignment
        tensors: dict[str, StoredTensor] = {}
        for name, (shape, number, offset) in places.items():
            kind, block, size = self._type(name, number)
            if 0 in shape or math.prod(shape) >= 2**48 or shape[-1] % block:
                raise self._broken(f"describes the tensor {name!r} with shape {list(shape)} in {kind}")
            start, nbytes = base + offset, math.prod(shape) // block * size
            if offset % alignment or start + nbytes > self.size:
                what = "at an offset that is not aligned" if offset % alignment else f"up to byte {start + nbytes}"
                raise self._broken(
                    f"is truncated or damaged: tensor {name!r} would lie {what}, and the file has {self.size} bytes"
                )
            tensors[name] = StoredTensor(self.path, shape, kind, start, nbytes)
        end = base
        for name, stored in sorted(tensors.items(), key=lambda item: item[1].start):
            if stored.start < end:
                raise self._broken(f"has an overlap at tensor {name!r}")
            end = stored.start + stored.nbytes
        return tensors

    @cached_property
    def _types(self) -> dict[int, tuple[str, int, int]]:
        """ggml's types by number: name, values in a block, bytes of a block."""
        from gguf import GGML_QUANT_SIZES  # imports numpy; only needed for GGUF files

        return {int(kind): (kind.name, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}

    def _type(self, name: str, number: int) -> tuple[str, int, int]:
        if number not in self._types:
            raise CheckpointError(
                f"the tensor {name!r} is of ggml's type {number}, which this gguf-py does not know",
                self.path,
                "Update the gguf package, or give the model's own checkpoint",
            )
        return self._types[number]

    def _string(self, limit: int, where: str) -> str:
        (length,) = self._unpack("<Q")
        if length > limit:
            raise self._broken(f"announces {length} bytes of text for {where!r}")
        try:
            return self._bytes(length, where).decode()
        except UnicodeDecodeError:
            raise self._broken(f"has text that is not UTF-8 in {where!r}") from None

    def _unpack(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack(layout, self._bytes(struct.calcsize(layout), "the header"))

    def _bytes(self, count: int, where: str) -> bytes:
        self.at += count
        if self.at > self.size:
            raise self._broken(f"is truncated: {where!r} would end at byte {self.at}, and the file has {self.size}")
        if self.at > _MAX_BYTES:
            raise self._broken(f"has a header of more than {_MAX_BYTES} bytes")
        return self.file.read(count)

    def _broken(self, problem: str) -> CheckpointError:
        return CheckpointError(f"its header cannot be read: '{self.path.name}' {problem}", self.path, _WAY_OUT)

"""Writes GGUF files, version 3, with one tensor in memory at a time.

Format (ggml, docs/gguf.md): "GGUF", version, counts; key-value pairs; for each tensor its name, shape (innermost
dimension first), type and offset; padding; the data of the tensors, each padded to 32 bytes. All little-endian."""

import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from leangrid.errors import FormatError
from leangrid.storage.files import Bytes, atomic_write
from leangrid.storage.safetensors import memoryview_of

_MAGIC, _VERSION, _ALIGNMENT = b"GGUF", 3, 32
_STRING, _ARRAY = 8, 9
_MAX_NAME = 63  # ggml's GGML_MAX_NAME, less its final zero
# Type of a header value -> its number in the file and its format character for ``struct``.
SCALARS = {
    "uint8": (0, "B"),
    "int8": (1, "b"),
    "uint16": (2, "H"),
    "int16": (3, "h"),
    "uint32": (4, "I"),
    "int32": (5, "i"),
    "float32": (6, "f"),
    "bool": (7, "?"),
    "uint64": (10, "Q"),
    "int64": (11, "q"),
    "float64": (12, "d"),
}
PLAIN_TYPES = {"F32": 0, "F16": 1, "BF16": 30}  # ggml's numbers of the types without blocks, as safetensors names them


@dataclass(frozen=True)
class Field:
    """A value of the header. ``kind`` is string, bool or a number type such as uint32; a list or tuple as ``value`` is
    an array of that kind."""

    kind: str
    value: Any


@dataclass(frozen=True)
class TensorEntry:
    """A tensor to write.

    Attributes:
        shape: in torch's order (rows, columns); the file has the reverse.
        number: ggml's number of the type.
        nbytes: size of the data in bytes, without padding.
        make: returns the data: a tensor whose bytes are written, or pieces of bytes.
    """

    shape: tuple[int, ...]
    number: int
    nbytes: int
    make: Callable[[], Tensor | Iterable[Bytes]]


def save(path: Path, fields: Mapping[str, Field], tensors: Mapping[str, TensorEntry]) -> str:
    """Write the GGUF file ``path`` completely or not at all, and return the sha256 of its bytes in hex.

    Each tensor is made when it is written and freed before the next one.

    Raises:
        FormatError: a name or value that the format cannot hold, or a tensor that has not the announced size.
        OutputError: the file cannot be written.
    """
    head = _header(fields, tensors)
    total = len(head) + sum(_padded(entry.nbytes) for entry in tensors.values())
    return atomic_write(path, _stream(head, tensors), size=total)


def _stream(head: bytes, tensors: Mapping[str, TensorEntry]) -> Iterator[Bytes]:
    yield head
    for name, entry in tensors.items():
        made, written = entry.make(), 0
        for piece in [memoryview_of(made)] if isinstance(made, Tensor) else made:
            written += len(memoryview(piece).cast("B"))
            yield piece
        if written != entry.nbytes:
            raise FormatError(f"{written} bytes were made of a tensor of {entry.nbytes}", name)
        yield bytes(_padded(written) - written)


def _header(fields: Mapping[str, Field], tensors: Mapping[str, TensorEntry]) -> bytes:
    parts = [_MAGIC, struct.pack("<IQQ", _VERSION, len(tensors), len(fields))]
    parts += [_string(key) + _field(key, field) for key, field in fields.items()]
    offset = 0
    for name, entry in tensors.items():
        if len(name.encode()) > _MAX_NAME:
            raise FormatError(f"GGUF names tensors in at most {_MAX_NAME} bytes", name)
        sizes = struct.pack(f"<I{len(entry.shape)}Q", len(entry.shape), *reversed(entry.shape))
        parts.append(_string(name) + sizes + struct.pack("<IQ", entry.number, offset))
        offset += _padded(entry.nbytes)
    head = b"".join(parts)
    return head + bytes(_padded(len(head)) - len(head))


def _field(key: str, field: Field) -> bytes:
    number = _STRING if field.kind == "string" else SCALARS[field.kind][0]
    try:
        if isinstance(field.value, list | tuple):
            return struct.pack("<IIQ", _ARRAY, number, len(field.value)) + _values(field.kind, field.value)
        return struct.pack("<I", number) + _values(field.kind, [field.value])
    except (struct.error, OverflowError, AttributeError, UnicodeEncodeError) as error:
        raise FormatError(f"{str(field.value)[:40]!r} is no {field.kind}: {error}", f"GGUF field {key}") from error


def _values(kind: str, values: Sequence[Any]) -> bytes:
    if kind == "string":
        return b"".join(_string(value) for value in values)
    return struct.pack(f"<{len(values)}{SCALARS[kind][1]}", *values)


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _padded(count: int) -> int:
    """``count`` bytes rounded up to a multiple of the alignment."""
    return -(-count // _ALIGNMENT) * _ALIGNMENT

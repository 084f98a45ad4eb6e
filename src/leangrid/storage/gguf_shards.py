"""Finds and reads all parts of a GGUF model that llama-gguf-split split into several files."""

import re
from pathlib import Path

from leangrid.errors import CheckpointError
from leangrid.storage.gguf_header import Header, read_header

_PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.gguf)", re.IGNORECASE | re.DOTALL)
_NUMBER, _COUNT, _TENSORS = "split.no", "split.count", "split.tensors.count"


def list_parts(path: Path) -> list[Path]:
    """All files of the model to which ``path`` belongs, in order; only ``path`` if its name is not that of a part.

    Raises:
        CheckpointError: a part is missing.
    """
    match = _PART.fullmatch(path.name)
    if match is None or not 1 <= int(match["number"]) <= int(match["count"]):
        return [path]
    count = int(match["count"])
    found = [
        path.with_name(f"{match['stem']}-{number:05d}-of-{count:05d}{match['suffix']}")
        for number in range(1, count + 1)
    ]
    missing = [part.name for part in found if not part.is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            f"this model is split into {count} files, and the part {missing[0]}{more} is missing",
            path.parent,
            "Put all parts into one directory",
        )
    return found


def read_model_header(path: Path) -> Header:
    """The header of the whole model to which ``path`` belongs: the fields of its first part, the tensors of all.

    Raises:
        CheckpointError: a part is missing, damaged, or belongs to another model.
    """
    given = read_header(path)
    files = list_parts(path)
    count = given.value(_COUNT, 0)
    if len(files) == 1 or not count:
        if isinstance(count, int) and count > 1:
            raise CheckpointError(
                f"this is part {given.value(_NUMBER, 0) + 1} of a model split into {count} files, and its name does "
                "not say so",
                path,
                "Give the parts their names back: NAME-00001-of-00002.gguf",
            )
        return given
    headers = [given if file == path else read_header(file) for file in files]
    first = headers[0]
    tensors = {}
    for number, header in enumerate(headers):
        if (header.value(_NUMBER), header.value(_COUNT)) != (number, len(files)):
            raise _foreign(
                header, f"says that it is part {header.value(_NUMBER)} of {header.value(_COUNT)}, counted from 0"
            )
        for key in ("general.architecture", "general.name", _TENSORS):
            if header.value(key) is not None and header.value(key) != first.value(key):
                raise _foreign(header, f"gives {key} as {header.value(key)!r}, the first part as {first.value(key)!r}")
        again = next((name for name in header.tensors if name in tensors), None)
        if again is not None:
            raise _foreign(header, f"holds the tensor {again!r} again")
        tensors |= header.tensors
    expected = first.value(_TENSORS)
    if expected is not None and expected != len(tensors):
        raise CheckpointError(
            f"the parts of this split model hold {len(tensors)} tensors, and {expected} are announced",
            files[0].parent,
            "Check that all parts are of one download",
        )
    return Header(first.file, first.fields, tensors)


def _foreign(header: Header, problem: str) -> CheckpointError:
    return CheckpointError(f"the part '{header.file.name}' is not of this model: it {problem}", header.file,
                           "Put all parts of one model into one directory")  # fmt: skip

"""Calibration windows: token ids of text, all of one length, or rows with pictures, each as its processor gives it."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import overload

import torch
from torch import Tensor

RowInputs = Mapping[str, Tensor]
_ROW, _DIGITS = "row", 6


class PictureRows(Sequence[RowInputs]):
    """Rows with pictures: of each all that the model is called with, by the names of its arguments.

    Each row is a batch of one window: ``input_ids`` is int64 [1, length], and lengths differ.

    Args:
        rows: in the order in which the model is run on them.
    """

    def __init__(self, rows: Sequence[RowInputs]) -> None:
        self._rows = list(rows)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> RowInputs: ...
    @overload
    def __getitem__(self, index: slice) -> "PictureRows": ...
    def __getitem__(self, index: int | slice) -> "RowInputs | PictureRows":
        return PictureRows(self._rows[index]) if isinstance(index, slice) else self._rows[index]

    def __iter__(self) -> Iterator[RowInputs]:
        return iter(self._rows)

    @property
    def shape(self) -> tuple[int, int]:
        """How many rows, and the tokens of the longest."""
        return len(self), max((row["input_ids"].shape[1] for row in self._rows), default=0)

    def numel(self) -> int:
        """Tokens of all rows."""
        return sum(row["input_ids"].numel() for row in self._rows)

    def split(self, _windows: int | list[int]) -> list[RowInputs]:
        """The batches for forward passes: one a row, whatever the number of windows that would fit."""
        return list(self._rows)

    def tensor_split(self, parts: int) -> list["PictureRows"]:
        """Consecutive rows in ``parts`` parts, whose sizes differ by at most one."""
        return [PictureRows([self._rows[i] for i in part]) for part in torch.arange(len(self)).tensor_split(parts)]

    def to_tensors(self, kind: str = _ROW) -> dict[str, Tensor]:
        """As named tensors, for a file."""
        return {
            f"{kind}.{number:0{_DIGITS}d}.{name}": row[name].contiguous()
            for number, row in enumerate(self._rows)
            for name in sorted(row)
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], kind: str = _ROW) -> "PictureRows":
        """The inverse of ``to_tensors``; no rows where there are none of this ``kind``."""
        rows: dict[str, dict[str, Tensor]] = {}
        for name in sorted(tensors):
            of, _, rest = name.partition(".")
            number, _, argument = rest.partition(".")
            if of == kind and argument:
                rows.setdefault(number, {})[argument] = tensors[name]
        return cls(list(rows.values()))

    def sha256(self) -> str:
        """The sha256, in hex, of all tensors of all rows: names, dtypes, shapes and numbers."""
        total = hashlib.sha256()
        for name, tensor in self.to_tensors().items():
            total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            total.update(tensor.cpu().flatten().view(torch.uint8).numpy().tobytes())
        return total.hexdigest()


Windows = Tensor | PictureRows

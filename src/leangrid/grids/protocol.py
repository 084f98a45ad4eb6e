"""What every grid offers, and the checks at the door of every fit."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from leangrid.errors import ShapeError


class Grid(ABC):
    """The values that the weights of each row may take; codes are indices into them, in original column order."""

    bits: int  # b: a code is below 2^b
    levels: Float[Tensor, "rows ..."]  # all levels, float32: [rows, K], or [rows, groups, K] for grids with groups

    @abstractmethod
    def dequantize(self, codes: Int[Tensor, "rows cols"] | UInt8[Tensor, "rows cols"]) -> Float[Tensor, "rows cols"]:
        """The weights, float32, that the codes stand for."""

    @abstractmethod
    def nearest(self, weight: Float[Tensor, "rows cols"]) -> UInt8[Tensor, "rows cols"]:
        """Codes of the nearest levels."""

    @abstractmethod
    def rounded(self, dtype: torch.dtype) -> Any:
        """This grid with its parameters rounded to the dtype they are stored in; finite, never zero scales."""

    @abstractmethod
    def take(self, rows: Tensor) -> Any:
        """The grid of some rows (indices or mask)."""

    @abstractmethod
    def put(self, rows: Tensor, other: Any) -> Any:
        """This grid with ``rows`` (indices or mask) replaced by the rows of ``other``, in order."""


@dataclass(frozen=True)
class Precision:
    """How a container keeps a grid's parameters: ``dtype`` rounds them, and W; scales also stay within ``smallest`` and ``largest``."""

    dtype: torch.dtype
    smallest: float = 0.0
    largest: float = math.inf

    @classmethod
    def of(cls, dtype: "torch.dtype | Precision") -> "Precision":
        """A plain dtype as a Precision without limits."""
        return cls(dtype) if isinstance(dtype, torch.dtype) else dtype

    def clamped(self, scale: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """``scale`` with magnitudes inside the range, signs kept."""
        return torch.copysign(scale.abs().clamp(self.smallest, self.largest), scale)


def check_weight(weight: Tensor) -> Float[Tensor, "rows cols"]:
    """``weight`` as contiguous float32 [rows, cols]; ShapeError for anything that no grid can hold."""
    if weight.ndim != 2 or 0 in weight.shape or not weight.is_floating_point():
        raise ShapeError(f"a weight is a floating-point matrix, not {tuple(weight.shape)} of {weight.dtype}", "grid")
    weight = weight.detach().float().contiguous()
    finite = weight.sum().isfinite()  # one cheap pass, and no weight looked at twice unless something is wrong
    if not bool(finite) and not bool((finite := weight.isfinite()).all()):
        raise ShapeError(
            f"{int((~finite).sum())} of {weight.numel()} weights are NaN or infinite",
            "grid",
            "The checkpoint is damaged: download it again",
        )
    return weight


def group_columns(cols: int, group_size: int | None) -> int:
    """Columns in a group; ``None`` is the whole row. ShapeError naming both numbers where it does not divide."""
    size = cols if group_size is None else group_size
    if size < 1 or cols % size:
        raise ShapeError(
            f"groups of {size} columns do not divide {cols} columns", "grid", "Use a group size that divides, or whole rows (no _G)"
        )
    return size


def replaced(tensor: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """A copy of ``tensor`` with some rows replaced."""
    result = tensor.clone()
    result[rows] = values
    return result

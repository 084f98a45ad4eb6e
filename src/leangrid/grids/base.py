"""What every grid offers, and the checks at the door of every fit."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import torch
from jaxtyping import Float, Float32, Float64, Int, UInt8
from torch import Tensor

from leangrid.errors import ShapeError


class Grid(ABC):
    """The values that the weights of each row may take; codes are indices into them, in original column order.

    A grid is a frozen dataclass whose tensors all have one row for every row of the weight.
    """

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
    def group_of(self, cols: int) -> Int[Tensor, " cols"]:
        """int32: the group of each column of a row of ``cols``, original order. ShapeError where they do not match."""

    @abstractmethod
    def sweep_block(
        self, weight: Float32[Tensor, "rows b"], upper: Float32[Tensor, "b b"], group: Int[Tensor, " b"]
    ) -> tuple[UInt8[Tensor, "rows b"], Float32[Tensor, "rows b"]]:
        """``kernels.sweep_*`` onto this grid; ``group`` of each column as ``group_of`` has it."""

    @abstractmethod
    def descend_block(
        self,
        gradient: Float32[Tensor, "rows b"],
        hessian: Float32[Tensor, "b b"],
        codes: UInt8[Tensor, "rows b"],
        group: Int[Tensor, " b"],
    ) -> tuple[UInt8[Tensor, "rows b"], Float32[Tensor, "rows b"]]:
        """``kernels.descend_*`` on this grid."""

    def take(self, rows: Tensor) -> Any:
        """The grid of some rows (indices or mask)."""
        return self._changed(lambda mine: mine[rows])

    def put(self, rows: Tensor, other: Any) -> Any:
        """This grid with ``rows`` (indices or mask) replaced by the rows of ``other``, in order."""
        return self._changed(lambda mine, theirs: mine.index_put((rows,), theirs), other)

    def to(self, device: torch.device | str) -> Any:
        """This grid on ``device``."""
        return self._changed(lambda mine: mine.to(device))

    def stacked(self, others: Sequence[Any]) -> Any:
        """This grid's rows, then those of ``others``."""
        return self._changed(lambda *all_rows: torch.cat(all_rows), *others)

    def _changed(self, change: Callable[..., Tensor], *others: "Grid") -> Any:
        values = {f.name: getattr(self, f.name) for f in fields(cast(Any, self)) if f.init}
        names = [name for name, value in values.items() if isinstance(value, Tensor)]
        return replace(
            cast(Any, self),
            **{name: change(values[name], *(getattr(other, name) for other in others)) for name in names},
        )


class GroupedGrid(Grid):
    """Grids with one scale for each row and group of ``group_size`` columns (None: whole row), and codes 0..2^b - 1 in
    equal steps.

    Its free parameters enter the weights linearly: that is what a refit needs. They stand side by side in ``free``, as
    many kinds for each span of columns as ``units`` has."""

    scale: Float[Tensor, "rows groups"]
    group_size: int | None

    @property
    @abstractmethod
    def zero(self) -> Float64[Tensor, "rows groups"]:
        """The code, with a fraction, whose level would be 0."""

    @property
    @abstractmethod
    def free(self) -> Float[Tensor, "rows spans kinds"]:
        """The parameters that a refit may move."""

    @abstractmethod
    def units(self, codes: UInt8[Tensor, "rows cols"]) -> Float[Tensor, "rows kinds cols"]:
        """float32: what one unit of each parameter adds to the weights; their sum over kinds, times ``free``, is the
        weight."""

    @abstractmethod
    def refitted(self, free: Float[Tensor, "rows spans kinds"], dtype: torch.dtype) -> Any:
        """This grid with other parameters, rounded to the dtype they are stored in. One that no file should hold stays
        as it is."""

    def clamped(self, precision: "Precision") -> Any:
        """Scales within the range of ``precision``: a group of weights near zero gets a wider grid than it asks for."""
        return replace(cast(Any, self), scale=precision.clamped(self.scale))

    def group_of(self, cols: int) -> Int[Tensor, " cols"]:
        size = group_columns(cols, self.group_size)
        if cols // size != self.scale.shape[1]:
            raise ShapeError(
                f"{cols} columns hold {cols // size} groups of {size}, the grid has {self.scale.shape[1]}", "grid"
            )
        return torch.arange(cols, dtype=torch.int32, device=self.scale.device) // size

    def _grouped(self, matrix: Tensor) -> Tensor:
        self.group_of(matrix.shape[1])
        return matrix.reshape(matrix.shape[0], self.scale.shape[1], -1)


@dataclass(frozen=True)
class Precision:
    """How a container keeps a grid's parameters: ``dtype`` rounds them, and W; scales also stay within ``smallest`` and
    ``largest``."""

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
            f"groups of {size} columns do not divide {cols} columns",
            "grid",
            "Use a group size that divides, or whole rows (no _G)",
        )
    return size

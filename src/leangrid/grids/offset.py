"""Affine grids with a stored offset, S q + B: what MLX (scale and bias) and llama.cpp's blocks with a minimum hold.

Unlike S (q - Z) the offset is a number of its own, rounded to the dtype it is stored in, and need not be a multiple of S.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from leangrid.errors import ShapeError
from leangrid.grids.affine import round_scale
from leangrid.grids.protocol import Grid, group_columns, replaced


@dataclass(frozen=True, eq=False)
class OffsetGrid(Grid):
    """Levels ``scale`` * q + ``offset``, one pair for each row and group of ``group_size`` columns (None: whole row).

    ``scale`` float32 [rows, groups], finite, not zero; ``offset`` float32 [rows, groups], finite.
    """

    scale: Float[Tensor, "rows groups"]
    offset: Float[Tensor, "rows groups"]
    bits: int
    group_size: int | None = None

    def __post_init__(self) -> None:
        if self.scale.shape != self.offset.shape or self.scale.ndim != 2:
            raise ShapeError(f"scales {tuple(self.scale.shape)} and offsets {tuple(self.offset.shape)} do not match", "offset grid")
        if not bool((self.scale.isfinite() & (self.scale != 0)).all()) or not bool(self.offset.isfinite().all()):
            raise ShapeError("a scale is zero, or a scale or an offset is NaN or infinite", "offset grid")

    @property
    def levels(self) -> Float[Tensor, "rows groups levels"]:
        """float32 [rows, groups, 2^bits], ascending where the scale is positive."""
        codes = torch.arange(2**self.bits, device=self.scale.device)
        return self.scale[..., None] * codes + self.offset[..., None]

    def group_of(self, cols: int) -> Int[Tensor, " cols"]:
        """int32: the group of each column of a row of ``cols``, original order. ShapeError where they do not match."""
        size = group_columns(cols, self.group_size)
        if cols // size != self.scale.shape[1]:
            raise ShapeError(f"{cols} columns hold {cols // size} groups of {size}, the grid has {self.scale.shape[1]}", "offset grid")
        return torch.arange(cols, dtype=torch.int32, device=self.scale.device) // size

    def dequantize(self, codes: Int[Tensor, "rows cols"] | UInt8[Tensor, "rows cols"]) -> Float[Tensor, "rows cols"]:
        """float32 S q + B: one rounded product, one rounded sum, as the readers compute it."""
        return (self._grouped(codes).float() * self.scale[..., None] + self.offset[..., None]).reshape(codes.shape)

    def nearest(self, weight: Float[Tensor, "rows cols"]) -> UInt8[Tensor, "rows cols"]:
        """clamp(rint((w - B) / S), 0, 2^b - 1): the same arithmetic as the sweep."""
        codes = ((self._grouped(weight) - self.offset[..., None]) / self.scale[..., None]).round_()
        return codes.clamp_(0, 2**self.bits - 1).to(torch.uint8).reshape(weight.shape)

    def rounded(self, dtype: torch.dtype) -> "OffsetGrid":
        """Scales and offsets rounded to ``dtype``; scales kept away from zero and infinity."""
        info = torch.finfo(dtype)
        offset = self.offset.clamp(info.min, info.max).to(dtype).float()
        return replace(self, scale=round_scale(self.scale, dtype), offset=offset)

    def take(self, rows: Tensor) -> "OffsetGrid":
        """The grid of some rows (indices or mask)."""
        return replace(self, scale=self.scale[rows], offset=self.offset[rows])

    def put(self, rows: Tensor, other: "OffsetGrid") -> "OffsetGrid":
        """This grid with ``rows`` replaced by the rows of ``other``."""
        return replace(self, scale=replaced(self.scale, rows, other.scale), offset=replaced(self.offset, rows, other.offset))

    def _grouped(self, matrix: Tensor) -> Tensor:
        self.group_of(matrix.shape[1])
        return matrix.reshape(matrix.shape[0], self.scale.shape[1], -1)

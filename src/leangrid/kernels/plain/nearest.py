"""The three kinds of grid that the sweep and the descent quantize to: the code nearest to a number, and the level of a
code. The twin of the grids in cpu/sweep.h and of triton/nearest.py.

``code(x, column)`` is the code of the level nearest to x, one number a row; ``value(code, column)`` is the level that a
code stands for, f32 [rows]. Products and sums are separate, rounded operations (no fused multiply-add), so that C++ on
any instruction set gives the same bits."""

import torch
from jaxtyping import Float32, Integer, UInt8
from torch import Tensor


class LevelGrid:
    """Levels of each row's own, f32 [rows, K] sorted; a tie goes to the lower level."""

    def __init__(self, levels: Float32[Tensor, "rows k"]) -> None:
        self._levels = levels
        self._midpoints = 0.5 * levels[:, :-1] + 0.5 * levels[:, 1:]  # halved before the addition: no overflow

    def code(self, x: Tensor, column: int) -> Tensor:
        return (x[:, None] > self._midpoints).sum(1)

    def value(self, code: Tensor, column: int) -> Tensor:
        return self._levels.gather(1, code.long()[:, None])[:, 0]


class AffineGrid:
    """Levels S (q - Z), q = 0 .. 2^bits - 1, with S and Z of the column's group; q is rounded half to even."""

    def __init__(self, scale: Float32[Tensor, "rows g"], zero_point: UInt8[Tensor, "rows g"],
                 group: Integer[Tensor, "b"], bits: int) -> None:  # fmt: skip
        self._scale = scale[:, group.long()].T.contiguous()  # [columns, rows]
        self._zero_point = zero_point[:, group.long()].T.float()
        self._largest = 2**bits - 1

    def code(self, x: Tensor, column: int) -> Tensor:
        return torch.round((x / self._scale[column] + self._zero_point[column]).clamp(0, self._largest))

    def value(self, code: Tensor, column: int) -> Tensor:
        return self._scale[column] * (code.float() - self._zero_point[column])


class OffsetGrid:
    """Levels S q + B, q = 0 .. 2^bits - 1, with S and B of the column's group; q is rounded half to even."""

    def __init__(self, scale: Float32[Tensor, "rows g"], offset: Float32[Tensor, "rows g"],
                 group: Integer[Tensor, "b"], bits: int) -> None:  # fmt: skip
        self._scale = scale[:, group.long()].T.contiguous()  # [columns, rows]
        self._offset = offset[:, group.long()].T.contiguous()
        self._largest = 2**bits - 1

    def code(self, x: Tensor, column: int) -> Tensor:
        return torch.round(((x - self._offset[column]) / self._scale[column]).clamp(0, self._largest))

    def value(self, code: Tensor, column: int) -> Tensor:
        return self._scale[column] * code.float() + self._offset[column]


Grid = LevelGrid | AffineGrid | OffsetGrid

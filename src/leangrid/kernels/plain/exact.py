"""LeanQuant-Exact (Algorithm 2) in plain torch: the twin of cpu/exact.h. In every row the remaining column whose
quantization costs least is quantized next, and removed.

With A = (H + lambda I)^-1 of the remaining columns: pick j = argmin (w_j - q_j)^2 / (2 A_jj), move the others by
-(w_j - q_j) A_:j / A_jj, and eliminate j from A by one step of Gaussian elimination. Eliminating step by step is a
Cholesky factorization of the first A whose pivots the row chooses, so only the pivot rows are kept: row s of L is
A_j,: / sqrt(A_jj) at step s, the diagonal is updated in place, and A_j,: = A0_j,: - sum_s L_sj L_s,:. That is n^3/6
multiplications and n^2 numbers a row instead of n^3 reads and writes of A. Columns already quantized are dropped from
L at regular intervals. The loop runs over steps, for as many rows at once as CHUNK_BYTES allows.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

CHUNK_BYTES = 1 << 28  # of pivot rows held at once
_COMPACTIONS = 8  # how often quantized columns are dropped


def exact_levels(weight: Tensor, inverse: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """See ``leangrid.kernels.exact_levels``."""
    return _by_chunks(weight, inverse, lambda index: _Levels(levels[index].double()))


def exact_affine(
    weight: Tensor, inverse: Tensor, scale: Tensor, zero: Tensor, group: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    """See ``leangrid.kernels.exact_affine``."""
    column_group = group.long()
    return _by_chunks(
        weight,
        inverse,
        lambda index: _Affine(scale[index].double()[:, column_group], zero[index][:, column_group], bits),
    )


def _by_chunks(weight: Tensor, inverse: Tensor, grid_of: "Callable[[Tensor], _Grid]") -> tuple[Tensor, Tensor]:
    rows, cols = weight.shape
    chunk = max(1, CHUNK_BYTES // max(cols * cols * inverse.element_size(), 1))
    codes = torch.empty(rows, cols, dtype=torch.uint8, device=weight.device)
    loss = torch.zeros(rows, dtype=torch.float64, device=weight.device)
    for start in range(0, rows, chunk):
        index = torch.arange(start, min(start + chunk, rows), device=weight.device)
        codes[index], loss[index] = _Rows(weight[index].double(), inverse, grid_of(index)).run()
    return codes, loss


class _Grid(ABC):
    """The levels of the columns that remain in each row."""

    @abstractmethod
    def quantize(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Code and value of the level nearest to each remaining weight, [rows, remaining] both."""

    @abstractmethod
    def select(self, columns: Tensor) -> None:
        """Drop all columns but these: indices into the remaining ones, [rows, selected]."""


class _Levels(_Grid):
    def __init__(self, levels: Tensor) -> None:
        self.levels, self.midpoints = levels, 0.5 * (levels[:, :-1] + levels[:, 1:])

    def quantize(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        code = torch.searchsorted(self.midpoints, weight)
        return code, self.levels.gather(1, code)

    def select(self, columns: Tensor) -> None:
        del columns  # a row has the same levels in every column


class _Affine(_Grid):
    def __init__(self, scale: Tensor, zero: Tensor, bits: int) -> None:
        self.scale, self.zero, self.largest = scale, zero, 2**bits - 1

    def quantize(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        code = (weight / self.scale + self.zero).clamp_(0, self.largest).round_()
        return code, (code - self.zero) * self.scale

    def select(self, columns: Tensor) -> None:
        self.scale, self.zero = self.scale.gather(1, columns), self.zero.gather(1, columns)


class _Rows:
    """A chunk of rows while it is quantized.

    ``weight``, ``column``, ``diagonal`` and ``done`` have a column for each that was left at the last compaction:
    ``column`` is its index in the layer, ``diagonal`` its A_jj, ``done`` whether it was quantized since. ``pivots`` is
    L, [rows, steps, those columns]."""

    def __init__(self, weight: Tensor, inverse: Tensor, grid: _Grid) -> None:
        self.rows, self.cols = weight.shape
        self.inverse, self.grid = inverse, grid
        self.each = torch.arange(self.rows, device=weight.device)
        self.codes = torch.empty(self.rows, self.cols, dtype=torch.uint8, device=weight.device)
        self.loss = torch.zeros(self.rows, dtype=torch.float64, device=weight.device)
        self.weight = weight.clone()
        self.column = torch.arange(self.cols, device=weight.device).expand(self.rows, -1).contiguous()
        self.diagonal = inverse.diagonal().expand(self.rows, -1).clone()
        self.done = torch.zeros_like(weight, dtype=torch.bool)
        self.pivots = weight.new_empty(self.rows, self.cols, self.cols)

    def run(self) -> tuple[Tensor, Tensor]:
        interval = max(16, -(-self.cols // _COMPACTIONS))
        for step in range(self.cols):
            if step and step % interval == 0:
                self.compact(step)
            self.eliminate(step)
        return self.codes, self.loss

    def eliminate(self, step: int) -> None:
        """Quantize one column of each row, and remove it from A."""
        # The column that costs least: argmin (w_j - q_j)^2 / (2 A_jj).
        code, value = self.grid.quantize(self.weight)
        cost = (self.weight - value).square_().div_(self.diagonal).masked_fill_(self.done, float("inf"))
        smallest, pick = cost.min(dim=1)
        self.loss += smallest.double() / 2
        chosen = pick[:, None]
        column = self.column.gather(1, chosen)
        self.codes.scatter_(1, column, code.gather(1, chosen).to(torch.uint8))
        # Its row of A: the row of A0 less the products of the pivot rows so far; divided by sqrt(A_jj) it is the next.
        row = (
            self.inverse[column].squeeze(1) if self.column.shape[1] == self.cols else self.inverse[column, self.column]
        )
        pivots = self.pivots[:, :step]
        row = row - torch.bmm(pivots[self.each, :, pick][:, None], pivots).squeeze(1)
        pivot = self.diagonal.gather(1, chosen)
        row = row.masked_fill_(self.done, 0) / pivot.sqrt()
        # The other columns move by -(w_j - q_j) A_:j / A_jj, and A loses column j: A_kk -= L_k^2.
        error = (self.weight - value).gather(1, chosen) / pivot.sqrt()
        self.weight -= error * row
        self.done.scatter_(1, chosen, True)
        self.pivots[:, step] = row
        self.diagonal = (
            (self.diagonal - row.square()).clamp_(min=torch.finfo(row.dtype).tiny).masked_fill_(self.done, 1)
        )

    def compact(self, step: int) -> None:
        """Drop the columns quantized so far, after ``step`` steps, from everything that has one entry a column."""
        left = (~self.done).nonzero()[:, 1].reshape(self.rows, -1)
        old = self.pivots
        self.pivots = old.new_empty(self.rows, self.cols, left.shape[1])
        self.pivots[:, :step] = old[:, :step].gather(2, left[:, None].expand(-1, step, -1))
        self.weight, self.diagonal, self.column = (t.gather(1, left) for t in (self.weight, self.diagonal, self.column))
        self.done = torch.zeros_like(left, dtype=torch.bool)
        self.grid.select(left)

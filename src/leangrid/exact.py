"""LeanQuant-Exact (Algorithm 2): in every row, always quantize the remaining column that costs least, then remove it.

With A = (H + lambda I)^-1 of the remaining columns: pick j = argmin (w_j - q_j)^2 / (2 A_jj), move the others by
-(w_j - q_j) A_:j / A_jj, and eliminate j from A by one step of Gaussian elimination. Eliminating step by step is a
Cholesky factorization of the first A whose pivots the row chooses, so only the pivot rows are kept: row s of L is
A_j,: / sqrt(A_jj) at step s, the diagonal is updated in place, and A_j,: = A0_j,: - sum_s L_sj L_s,:. That is n^3/3
multiplications and n^2 numbers a row instead of n^3 reads and writes of A. Columns already done are dropped from L
every now and then. The loop runs over steps, for as many rows at once as the memory allows.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from leangrid.factor import Factor
from leangrid.grids import Grid, GroupedGrid
from leangrid.solver import Swept

_CHUNK_BYTES = 1 << 28  # of pivot rows held at once
_COMPACTIONS = 8


def exact_sweep(weight: Float[Tensor, "rows cols"], factor: Factor, grid: Grid, dtype: torch.dtype = torch.float64) -> Swept:
    """Quantize ``weight`` onto ``grid`` by optimal brain quantization, row by row its own order.

    Args:
        dtype: of the arithmetic; float32 halves the time.
    """
    rows, cols = weight.shape
    inverse = factor.inverse().to(dtype)
    chunk = max(1, _CHUNK_BYTES // (cols * cols * inverse.element_size()))
    codes = torch.empty(rows, cols, dtype=torch.uint8, device=weight.device)
    loss = torch.zeros(rows, dtype=torch.float64, device=weight.device)
    for start in range(0, rows, chunk):
        index = torch.arange(start, min(start + chunk, rows), device=weight.device)
        part = _Rows(weight[index].to(dtype), inverse, grid.take(index))
        codes[index], loss[index] = part.run()
    return Swept(codes, loss)


class _Rows:
    """The state of a chunk of rows; "here" arrays hold the columns kept since the last compaction."""

    def __init__(self, weight: Tensor, inverse: Tensor, grid: Grid) -> None:
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
        if isinstance(grid, GroupedGrid):
            group = grid.group_of(self.cols).long()
            self.scale, self.zero = grid.scale.to(weight.dtype)[:, group], grid.zero.to(weight.dtype)[:, group]
        else:
            self.levels = grid.levels.to(weight.dtype)
            self.midpoints = 0.5 * (self.levels[:, :-1] + self.levels[:, 1:])

    def run(self) -> tuple[Tensor, Tensor]:
        interval = max(16, -(-self.cols // _COMPACTIONS))
        for step in range(self.cols):
            if step and step % interval == 0:
                self.compact(step)
            self.eliminate(step)
        return self.codes, self.loss

    def quantized(self) -> tuple[Tensor, Tensor]:
        """Code and value of the level nearest to every kept column."""
        if isinstance(self.grid, GroupedGrid):
            code = (self.weight / self.scale + self.zero).round_().clamp_(0, 2**self.grid.bits - 1)
            return code, (code - self.zero) * self.scale
        code = torch.searchsorted(self.midpoints, self.weight)
        return code, self.levels.gather(1, code)

    def eliminate(self, step: int) -> None:
        code, value = self.quantized()
        cost = (self.weight - value).square_().div_(self.diagonal).masked_fill_(self.done, float("inf"))
        smallest, pick = cost.min(dim=1)
        self.loss += smallest.double() / 2
        chosen = pick[:, None]
        column = self.column.gather(1, chosen)
        self.codes.scatter_(1, column, code.gather(1, chosen).to(torch.uint8))
        row = self.inverse[column].squeeze(1) if self.column.shape[1] == self.cols else self.inverse[column, self.column]
        pivots = self.pivots[:, :step]
        row = row - torch.bmm(pivots[self.each, :, pick][:, None], pivots).squeeze(1)
        pivot = self.diagonal.gather(1, chosen)
        row = row.masked_fill_(self.done, 0) / pivot.sqrt()
        error = (self.weight - value).gather(1, chosen) / pivot.sqrt()
        self.weight -= error * row
        self.done.scatter_(1, chosen, True)
        self.pivots[:, step] = row
        self.diagonal = (self.diagonal - row.square()).clamp_(min=torch.finfo(row.dtype).tiny).masked_fill_(self.done, 1)

    def compact(self, step: int) -> None:
        """Drop the columns that are done from everything; ``step`` of the present ones are."""
        keep = (~self.done).nonzero()[:, 1].reshape(self.rows, -1)
        old = self.pivots
        self.pivots = old.new_empty(self.rows, self.cols, keep.shape[1])
        self.pivots[:, :step] = old[:, :step].gather(2, keep[:, None].expand(-1, step, -1))
        self.weight, self.diagonal, self.column = (t.gather(1, keep) for t in (self.weight, self.diagonal, self.column))
        self.done = torch.zeros_like(keep, dtype=torch.bool)
        if isinstance(self.grid, GroupedGrid):
            self.scale, self.zero = self.scale.gather(1, keep), self.zero.gather(1, keep)

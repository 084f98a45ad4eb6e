"""What happens inside one block of columns (the sweep, the descent) and the Gram matrix of levels, in plain torch.

Twins of cpu/sweep.h and cpu/gram.h. Products and sums are separate, rounded operations (no fused multiply-add) and
every element sees its updates in column order, so the C++ on any instruction set gives the same bits."""

import torch
from jaxtyping import Float32, Float64, Int64, Integer, UInt8
from torch import Tensor

BETTER = 1.0 - 1e-6  # a code moves only for a gain that float32 noise cannot fake
GRAM_ELEMENTS = 1 << 25


def midpoints(levels: Float32[Tensor, "rows k"]) -> Float32[Tensor, "rows k-1"]:
    """Between neighbouring levels, halved before the addition: no overflow."""
    return 0.5 * levels[:, :-1] + 0.5 * levels[:, 1:]


class _Levels:
    """Nearest of a row's own levels; ties to the lower one."""

    def __init__(self, levels: Tensor) -> None:
        self.levels, self.middles = levels, midpoints(levels)

    def code(self, x: Tensor, column: int) -> Tensor:
        return (x[:, None] > self.middles).sum(1)

    def value(self, code: Tensor, column: int) -> Tensor:
        return self.levels.gather(1, code.long()[:, None])[:, 0]


class _Affine:
    """Nearest of S (q - Z), S and Z those of the column's group."""

    def __init__(self, scale: Tensor, zero_point: Tensor, group: Tensor, bits: int) -> None:
        self.scale, self.zero_point, self.top = (
            scale[:, group.long()].T.contiguous(),
            zero_point[:, group.long()].T.float(),
            2**bits - 1,
        )

    def code(self, x: Tensor, column: int) -> Tensor:
        return torch.round((x / self.scale[column] + self.zero_point[column]).clamp(0, self.top))

    def value(self, code: Tensor, column: int) -> Tensor:
        return self.scale[column] * (code.float() - self.zero_point[column])


class _Offset:
    """Nearest of S q + B, S and B those of the column's group; product and sum are rounded apart."""

    def __init__(self, scale: Tensor, offset: Tensor, group: Tensor, bits: int) -> None:
        self.scale, self.offset, self.top = (
            scale[:, group.long()].T.contiguous(),
            offset[:, group.long()].T.contiguous(),
            2**bits - 1,
        )

    def code(self, x: Tensor, column: int) -> Tensor:
        return torch.round(((x - self.offset[column]) / self.scale[column]).clamp(0, self.top))

    def value(self, code: Tensor, column: int) -> Tensor:
        return self.scale[column] * code.float() + self.offset[column]


_Grid = _Levels | _Affine | _Offset


def _sweep(weight: Tensor, upper: Tensor, grid: _Grid) -> tuple[Tensor, Tensor]:
    left = weight.T.clone(
        memory_format=torch.contiguous_format
    )  # columns as rows: every step touches contiguous memory
    codes = torch.empty(left.shape, dtype=torch.uint8, device=weight.device)
    errors = torch.empty_like(left)
    for j in range(len(left)):
        code = grid.code(left[j], j)
        error = (left[j] - grid.value(code, j)) / upper[j, j]
        codes[j], errors[j] = code.to(torch.uint8), error
        left[j + 1 :] -= upper[j, j + 1 :, None] * error
    return codes.T.contiguous(), errors.T.contiguous()


def _descend(gradient: Tensor, hessian: Tensor, codes: Tensor, grid: _Grid) -> tuple[Tensor, Tensor]:
    slope = gradient.T.clone(memory_format=torch.contiguous_format)
    codes = codes.T.clone(memory_format=torch.contiguous_format)
    delta = torch.zeros_like(slope)
    positive = (hessian.diagonal() > 0).tolist()
    for j in range(len(slope)):
        if not positive[j]:
            continue
        now = grid.value(codes[j], j)
        wanted = now - slope[j] / hessian[j, j]
        code = grid.code(wanted, j)
        new = grid.value(code, j)
        move = (wanted - new).abs() < (wanted - now).abs() * BETTER
        delta[j] = torch.where(move, new - now, 0.0)
        codes[j] = torch.where(move, code.to(torch.uint8), codes[j])
        slope[j + 1 :] += hessian[j, j + 1 :, None] * delta[j]
    return codes.T.contiguous(), delta.T.contiguous()


def sweep_levels(weight: Float32[Tensor, "rows b"], upper: Float32[Tensor, "b b"],
                 levels: Float32[Tensor, "rows k"]) -> tuple[UInt8[Tensor, "rows b"], Float32[Tensor, "rows b"]]:  # fmt: skip
    """See ``leangrid.kernels.sweep_levels``."""
    return _sweep(weight, upper, _Levels(levels))


def sweep_affine(weight: Float32[Tensor, "rows b"], upper: Float32[Tensor, "b b"], scale: Float32[Tensor, "rows g"],
                 zero_point: UInt8[Tensor, "rows g"], group: Integer[Tensor, "b"],
                 bits: int) -> tuple[UInt8[Tensor, "rows b"], Float32[Tensor, "rows b"]]:  # fmt: skip
    """See ``leangrid.kernels.sweep_affine``."""
    return _sweep(weight, upper, _Affine(scale, zero_point, group, bits))


def sweep_offset(weight: Float32[Tensor, "rows b"], upper: Float32[Tensor, "b b"], scale: Float32[Tensor, "rows g"],
                 offset: Float32[Tensor, "rows g"], group: Integer[Tensor, "b"],
                 bits: int) -> tuple[UInt8[Tensor, "rows b"], Float32[Tensor, "rows b"]]:  # fmt: skip
    """See ``leangrid.kernels.sweep_offset``."""
    return _sweep(weight, upper, _Offset(scale, offset, group, bits))


def descend_levels(gradient: Float32[Tensor, "rows b"], hessian: Float32[Tensor, "b b"], codes: UInt8[Tensor, "rows b"],
                   levels: Float32[Tensor, "rows k"]) -> tuple[UInt8[Tensor, "rows b"], Float32[Tensor, "rows b"]]:  # fmt: skip
    """See ``leangrid.kernels.descend_levels``."""
    return _descend(gradient, hessian, codes, _Levels(levels))


def descend_affine(gradient: Float32[Tensor, "rows b"], hessian: Float32[Tensor, "b b"], codes: UInt8[Tensor, "rows b"],
                   scale: Float32[Tensor, "rows g"], zero_point: UInt8[Tensor, "rows g"], group: Integer[Tensor, "b"],
                   bits: int) -> tuple[UInt8[Tensor, "rows b"], Float32[Tensor, "rows b"]]:  # fmt: skip
    """See ``leangrid.kernels.descend_affine``."""
    return _descend(gradient, hessian, codes, _Affine(scale, zero_point, group, bits))


def descend_offset(gradient: Float32[Tensor, "rows b"], hessian: Float32[Tensor, "b b"], codes: UInt8[Tensor, "rows b"],
                   scale: Float32[Tensor, "rows g"], offset: Float32[Tensor, "rows g"], group: Integer[Tensor, "b"],
                   bits: int) -> tuple[UInt8[Tensor, "rows b"], Float32[Tensor, "rows b"]]:  # fmt: skip
    """See ``leangrid.kernels.descend_offset``."""
    return _descend(gradient, hessian, codes, _Offset(scale, offset, group, bits))


def level_gram(
    hessian: Float32[Tensor, "n n"], codes: UInt8[Tensor, "rows n"], levels: int
) -> Float64[Tensor, "rows k k"]:
    """See ``leangrid.kernels.level_gram``: here K dense products a row, chunked over rows."""
    rows, n = codes.shape
    out = torch.zeros(rows, levels, levels, dtype=torch.float64, device=hessian.device)
    step = max(1, GRAM_ELEMENTS // max(1, n * levels))
    for r in range(0, rows, step):
        part: Int64[Tensor, "r n"] = codes[r : r + step].long()
        onehot = torch.zeros(len(part), levels, n, device=hessian.device).scatter_(1, part[:, None, :], 1.0)
        product = (onehot.reshape(-1, n) @ hessian).view(len(part), levels, n).double()
        out[r : r + step] = product @ onehot.double().transpose(1, 2)
    return out

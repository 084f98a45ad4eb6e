"""What the kernels accept: one ShapeError a rule, raised before a pointer reaches C++."""

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from leangrid.errors import ShapeError


def weights(op: str, weight: Tensor) -> Tensor:
    """f32 [rows, n], n >= 1, finite; contiguous and detached."""
    _matrix(op, "weight", weight, torch.float32)
    if weight.shape[1] == 0:
        raise ShapeError(f"{op}: weight of shape {tuple(weight.shape)} has no columns", "weight")
    if len(weight):
        low, high = weight.aminmax()
        if not bool(low.isfinite() & high.isfinite()):
            raise ShapeError(f"{op}: weight holds NaN or infinite values", "weight", "Check the source tensor")
    return weight.detach().contiguous()


def normalised_importance(
    op: str, importance: Tensor, weight: Tensor
) -> tuple[Float64[Tensor, "*shape"], Int[Tensor, "*unit"], Tensor]:
    """importance / 2^unit (exact; keeps huge and tiny importances away from overflow), unit, and which rows hold only
    zeros.

    unit and the mask have shape [1] for importance [n], and [rows, 1] for [rows, n].
    """
    if importance.dtype != torch.float64 or importance.shape not in (weight.shape, weight.shape[1:]):
        raise ShapeError(
            f"{op}: importance {importance.dtype} {tuple(importance.shape)} for weight {tuple(weight.shape)}",
            "importance",
            "Give float64 of shape [cols] or [rows, cols]",
        )
    if importance.device != weight.device:
        raise ShapeError(f"{op}: importance is on {importance.device}, weight on {weight.device}", "importance")
    low, high = torch.aminmax(importance.detach(), dim=-1, keepdim=True)
    if not bool(((low >= 0) & high.isfinite()).all()):
        raise ShapeError(f"{op}: importance holds negative, NaN or infinite values", "importance",
                         "Normalise the weights U_jj^-p by their maximum")  # fmt: skip
    unit = torch.frexp(high).exponent
    return torch.ldexp(importance.detach(), -unit).contiguous(), unit, high == 0


def block(
    op: str, rows: Tensor, square: Tensor, name: str, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """rows [rows, b] of ``dtype`` and an f32 [b, b] beside it, on one device."""
    _matrix(op, "codes" if dtype == torch.uint8 else "weight", rows, dtype)
    _matrix(op, name, square, torch.float32)
    if square.shape != (rows.shape[1], rows.shape[1]) or square.device != rows.device:
        raise ShapeError(
            f"{op}: {name} {tuple(square.shape)} on {square.device} for rows {tuple(rows.shape)} on {rows.device}",
            name,
            "It must be square, one row a column, on the same device",
        )
    return rows.detach().contiguous(), square.detach().contiguous()


def square_beside(op: str, inverse: Tensor, weight: Tensor) -> Tensor:
    """f64 [n, n] for a weight [rows, n], on its device, with a positive diagonal."""
    _matrix(op, "inverse", inverse, torch.float64)
    cols = weight.shape[1]
    if inverse.shape != (cols, cols) or inverse.device != weight.device or not bool((inverse.diagonal() > 0).all()):
        raise ShapeError(
            f"{op}: inverse {tuple(inverse.shape)} on {inverse.device} for weight {tuple(weight.shape)} on {weight.device}",
            "inverse",
            "It must be positive definite, one row a column, on the same device",
        )
    return inverse.detach().contiguous()


def per_row(op: str, name: str, tensor: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """[rows, 1..] of ``dtype`` on the device of ``rows``, at least one column; at most 256 levels."""
    _matrix(op, name, tensor, dtype)
    if (
        len(tensor) != len(rows)
        or tensor.shape[1] == 0
        or (name == "levels" and tensor.shape[1] > 256)
        or tensor.device != rows.device
    ):
        raise ShapeError(
            f"{op}: {name} {tuple(tensor.shape)} on {tensor.device} for rows {tuple(rows.shape)} on {rows.device}",
            name,
            "One row of it for every row, on the same device",
        )
    return tensor.detach().contiguous()


def codes_below(op: str, codes: Tensor, levels: int, shape: torch.Size) -> Tensor:
    """u8 codes of ``shape``, every one below ``levels``."""
    _matrix(op, "codes", codes, torch.uint8)
    if codes.shape != shape:
        raise ShapeError(f"{op}: codes {tuple(codes.shape)}, expected {tuple(shape)}", "codes")
    if levels < 256 and codes.numel() and int(codes.max()) >= levels:
        raise ShapeError(f"{op}: code {int(codes.max())} with {levels} levels", "codes")
    return codes.contiguous()


def group_index(op: str, group: Tensor, cols: int, groups: int) -> Tensor:
    """int [cols] with values in 0..groups-1, as contiguous int32."""
    if group.dtype not in (torch.int32, torch.int64) or group.shape != (cols,):
        raise ShapeError(f"{op}: group {group.dtype} {tuple(group.shape)}, expected int [{cols}]", "group")
    if cols:
        low, high = group.aminmax()
        if int(low) < 0 or int(high) >= groups:
            raise ShapeError(f"{op}: group index {int(low)}..{int(high)} with {groups} groups", "group")
    return group.to(torch.int32).contiguous()


def _matrix(op: str, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.ndim != 2 or tensor.dtype != dtype:
        raise ShapeError(f"{op}: {name} is {tensor.dtype} {tuple(tensor.shape)}, expected a matrix of {dtype}", name)

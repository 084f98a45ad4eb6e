"""What the kernels accept: a ShapeError for each rule, raised before a pointer reaches C++ or a GPU.

``op`` is the name of the kernel, which its errors begin with. What is returned is detached and contiguous."""

import torch
from jaxtyping import Bool, Float64, Int
from torch import Tensor

from leangrid.errors import ShapeError
from leangrid.kernels.plain.packed import TILE_ROWS, tile_bytes

# The dtypes of grids and products, with the numbers by which C++ and Triton know them.
FLOATS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def check_weight(op: str, weight: Tensor) -> Tensor:
    """A weight must be f32 [rows, n], n >= 1, and finite."""
    _check_matrix(op, "weight", weight, torch.float32)
    if weight.shape[1] == 0:
        raise ShapeError(f"{op}: weight of shape {tuple(weight.shape)} has no columns", "weight")
    if len(weight):
        low, high = weight.aminmax()
        if not bool(low.isfinite() & high.isfinite()):
            raise ShapeError(f"{op}: weight holds NaN or infinite values", "weight", "Check the source tensor")
    return weight.detach().contiguous()


def normalise_importance(
    op: str, importance: Tensor, weight: Tensor
) -> tuple[Float64[Tensor, "*shape"], Int[Tensor, "*unit"], Bool[Tensor, "*unit"]]:
    """Divide importances by a power of two, which is exact, so that huge and tiny ones do not overflow in a sum.

    Args:
        importance: f64 [n] or [rows, n] for a weight [rows, n], finite and not negative.

    Returns:
        importance / 2^unit; unit; and which rows hold only zeros. The last two have shape [1] for importance [n], and
        [rows, 1] for [rows, n].
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


def check_block(
    op: str, rows: Tensor, square: Tensor, name: str, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """A block of columns must be [rows, b] of ``dtype``, the matrix ``name`` that belongs to it f32 [b, b] on the same
    device."""
    _check_matrix(op, "codes" if dtype == torch.uint8 else "weight", rows, dtype)
    _check_matrix(op, name, square, torch.float32)
    if square.shape != (rows.shape[1], rows.shape[1]) or square.device != rows.device:
        raise ShapeError(
            f"{op}: {name} {tuple(square.shape)} on {square.device} for rows {tuple(rows.shape)} on {rows.device}",
            name,
            "It must be square, one row a column, on the same device",
        )
    return rows.detach().contiguous(), square.detach().contiguous()


def check_inverse(op: str, inverse: Tensor, weight: Tensor) -> Tensor:
    """The inverse Hessian of a weight [rows, n] must be f64 [n, n] on its device, with a positive diagonal."""
    _check_matrix(op, "inverse", inverse, torch.float64)
    cols = weight.shape[1]
    if inverse.shape != (cols, cols) or inverse.device != weight.device or not bool((inverse.diagonal() > 0).all()):
        raise ShapeError(
            f"{op}: inverse {tuple(inverse.shape)} on {inverse.device} for weight {tuple(weight.shape)} on "
            f"{weight.device}",
            "inverse",
            "It must be positive definite, one row a column, on the same device",
        )
    return inverse.detach().contiguous()


def check_rows(op: str, name: str, tensor: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """What a grid holds for each of ``rows`` must be [rows, 1..] of ``dtype`` on their device; levels: at most 256."""
    _check_matrix(op, name, tensor, dtype)
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


def check_codes(op: str, codes: Tensor, levels: int, shape: torch.Size) -> Tensor:
    """Codes must be u8 of ``shape``, each below ``levels``."""
    _check_matrix(op, "codes", codes, torch.uint8)
    if codes.shape != shape:
        raise ShapeError(f"{op}: codes {tuple(codes.shape)}, expected {tuple(shape)}", "codes")
    if levels < 256 and codes.numel() and int(codes.max()) >= levels:
        raise ShapeError(f"{op}: code {int(codes.max())} with {levels} levels", "codes")
    return codes.contiguous()


def check_group_grid(
    op: str, weight: Tensor, scale: Tensor, zero: Tensor, group: Tensor, bits: int, kind: str
) -> tuple[Tensor, Tensor, Tensor]:
    """A grid of scales must have 1 to 8 bits, a scale f32 [rows, groups] and a tensor of the same shape beside it.

    Args:
        zero: what the grid holds beside its scales. kind: which it is: "zero_point" u8, "offset" f32 or "zero" f64.

    Returns:
        scale, zero, and group as int32 [cols].
    """
    if not 1 <= bits <= 8:
        raise ShapeError(f"{op}: {bits} bits", "bits", "Ask for 1 to 8")
    dtype = {"zero_point": torch.uint8, "offset": torch.float32, "zero": torch.float64}[kind]
    scale = check_rows(op, "scale", scale, weight, torch.float32)
    zero = check_rows(op, kind, zero, weight, dtype)
    if zero.shape != scale.shape:
        raise ShapeError(f"{op}: scale {tuple(scale.shape)} and {kind} {tuple(zero.shape)} differ", op)
    return scale, zero, check_group(op, group, weight.shape[1], scale.shape[1])


def check_group(op: str, group: Tensor, cols: int, groups: int) -> Tensor:
    """The group of each column must be int [cols] with values in 0..groups-1; returned as int32."""
    if group.dtype not in (torch.int32, torch.int64) or group.shape != (cols,):
        raise ShapeError(f"{op}: group {group.dtype} {tuple(group.shape)}, expected int [{cols}]", "group")
    if cols:
        low, high = group.aminmax()
        if int(low) < 0 or int(high) >= groups:
            raise ShapeError(f"{op}: group index {int(low)}..{int(high)} with {groups} groups", "group")
    return group.to(torch.int32).contiguous()


def check_product(op: str, x: Tensor, codes: Tensor, values: Tensor, bias: Tensor | None, bits: int) -> None:
    """Input [..., cols], codes (packed or tiled), grid values [rows, ...] and bias [rows] or None of one product must
    agree in dtype, device and shape."""
    if x.dtype != values.dtype or x.dtype not in FLOATS or (bias is not None and bias.dtype != x.dtype):
        of_bias = "" if bias is None else f", the bias {bias.dtype}"
        what = f"{op}: the input is {x.dtype}, the grid {values.dtype}{of_bias}"
        raise ShapeError(what, op, "All of one dtype: float32, bfloat16 or float16")
    if x.device != codes.device or x.device != values.device or (bias is not None and bias.device != x.device):
        what = f"{op}: the input is on {x.device}, the weight on {codes.device}"
        raise ShapeError(what, op, "Move one of them: layer.to(device)")
    if x.ndim < 1 or (bias is not None and len(bias) != len(values)):
        raise ShapeError(f"{op}: input {tuple(x.shape)}, {len(values)} rows, a bias that does not fit", op)
    rows, cols = len(values), x.shape[-1]
    if codes.dtype == torch.int32:
        check_packed(codes, bits, cols, rows)
    else:
        check_tiles(codes, bits, rows, cols)


def check_packed(words: Tensor, bits: int, cols: int, rows: int | None = None) -> None:
    """Packed codes must be [rows, ceil(cols * bits / 32)]; any number of rows where ``rows`` is None."""
    width = -(-cols * bits // 32)
    if not (1 <= bits <= 8 and cols >= 1 and words.shape[1] == width and rows in (None, len(words))):
        what = f"codes of {bits} bits for {cols} columns are not {tuple(words.shape)} words"
        raise ShapeError(what, "codes", "Look at formats/bit_stream.py")


def check_tiles(tiles: Tensor, bits: int, rows: int, cols: int) -> None:
    """Tiled codes must be u8 [ceil(rows / 4), tile_bytes(cols, bits)]."""
    fits = tiles.dtype == torch.uint8 and 1 <= bits <= 8 and cols >= 1 and rows >= 1
    if not fits or tuple(tiles.shape) != (-(-rows // TILE_ROWS), tile_bytes(cols, bits)):
        what = f"codes of {bits} bits for {rows} x {cols} are not {tiles.dtype} {tuple(tiles.shape)}"
        raise ShapeError(what, "codes", "Give int32 words (formats/bit_stream.py), or what kernels.packed.tile made")


def _check_matrix(op: str, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.ndim != 2 or tensor.dtype != dtype:
        raise ShapeError(f"{op}: {name} is {tensor.dtype} {tuple(tensor.shape)}, expected a matrix of {dtype}", name)

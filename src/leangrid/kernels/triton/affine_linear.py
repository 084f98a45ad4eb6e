"""x W^T for W[i, j] = round((code[i, j] - Z[i, g]) S[i, g]), g = j // group_size, the codes packed as they are
stored."""

import torch
from jaxtyping import Float
from torch import Tensor

from leangrid.errors import ShapeError
from leangrid.kernels.triton.packed import FLOATS, Packed, check_arguments, product


def affine_linear(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    group_size: int,
    stored_dtype: torch.dtype | None = None,
    splits: int | None = None,
) -> Float[Tensor, "m rows"]:
    """The product of an AffineLinear layer, without its bias.

    Args:
        x, words, bits, splits: as in ``lut_linear``.
        scale: S [rows, groups], float32, float16 or bfloat16.
        zero_point: Z, u8 [rows, groups], 0 .. 2^bits - 1, not packed.
        group_size: columns of a group; divides the columns.
        stored_dtype: the dtype that W is rounded to, as other readers of the checkpoint do; None: the dtype of
            ``scale``.

    Returns:
        [m, rows] of x's dtype. Products are in x's dtype where it is the stored one, else in float32; sums in float32.

    Raises:
        ShapeError: shapes, dtypes, bits or devices that do not fit.
    """
    check_arguments("affine_linear", x, words, bits, scale=scale, zero_point=zero_point)
    stored, cols = stored_dtype or scale.dtype, x.shape[1]
    if group_size < 1 or cols % group_size or scale.shape[1] * group_size != cols or zero_point.shape != scale.shape:
        raise ShapeError(
            f"affine_linear: scale {tuple(scale.shape)}, zero_point {tuple(zero_point.shape)}, groups of {group_size}, "
            f"{cols} columns",
            "group_size",
        )
    if scale.dtype not in FLOATS or stored not in FLOATS or zero_point.dtype != torch.uint8:
        raise ShapeError(
            f"affine_linear: scale {scale.dtype}, zero_point {zero_point.dtype}, stored as {stored}", "affine_linear"
        )
    scale = scale.contiguous()
    return product(
        x,
        Packed(words.contiguous(), scale, scale, zero_point.contiguous(), cols, bits, stored, True, group_size),
        splits,
    )

"""x W^T for W[i, j] = lut[i, code[i, j]], the codes packed as they are stored."""

from jaxtyping import Float
from torch import Tensor

from leangrid.errors import ShapeError
from leangrid.kernels.triton.packed import FLOATS, Packed, check_arguments, product


def lut_linear(x: Tensor, words: Tensor, lut: Tensor, bits: int, splits: int | None = None) -> Float[Tensor, "m rows"]:
    """The product of a LutLinear layer, without its bias.

    Args:
        x: float32, float16 or bfloat16 [m, cols]; any strides, any m >= 0.
        words: packed codes, int32 [rows, ceil(cols b / 32)]: code i of a row has bits [i b, (i+1) b) of the row's
            stream, least significant first.
        lut: the levels [rows, 2^bits], float32, float16 or bfloat16.
        bits: b, one of 2, 3, 4, 8.
        splits: into how many sums over columns the work of 2 to 64 rows of x is divided; None chooses by the number
            of processors.

    Returns:
        [m, rows] of x's dtype. Products are in x's dtype where the levels have it too, else in float32; sums in
        float32.

    Raises:
        ShapeError: shapes, dtypes, bits or devices that do not fit.
    """
    check_arguments("lut_linear", x, words, bits, lut=lut)
    if lut.shape[1] != 2**bits or lut.dtype not in FLOATS:
        raise ShapeError(f"lut_linear: lut is {lut.dtype} {tuple(lut.shape)}", "lut", f"Give {2**bits} levels a row")
    words, lut = words.contiguous(), lut.contiguous()
    return product(x, Packed(words, lut, lut, words, x.shape[1], bits, lut.dtype, False), splits)
